//! Pictures and answers of nexus-tiny: files, reports, and what is never overwritten.

use std::{fs, path::Path, process::Stdio};

use super::{Ran, command, nexus, png_size, tiny_dir};

const PROMPT: &str = "a red circle to the left of a blue square";

#[test]
fn a_picture_is_drawn_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let ran = nexus(dir.path(), &["generate", PROMPT, "-o", "a.png", "--steps", "2", "--seed", "7", "--json"]);
    let report = ran.json();
    for (field, expected) in [
        ("command", serde_json::json!("generate")),
        ("picture", "a.png".into()),
        ("width_px", 144.into()),
        ("height_px", 144.into()),
        ("seed", 7.into()),
        ("steps", 2.into()),
        ("prompt", PROMPT.into()),
        ("device", "cpu".into()),
        ("model", tiny_dir().display().to_string().into()),
    ] {
        assert_eq!(report[field], expected, "{field}");
    }
    let seconds = report["seconds"].as_object().unwrap();
    let parts: f64 =
        seconds.iter().filter(|(name, _)| *name != "total").map(|(_, value)| value.as_f64().unwrap()).sum();
    let total = seconds["total"].as_f64().unwrap();
    assert!(parts > 0.0 && parts <= total, "{report}");
    assert!(seconds.contains_key("load") && seconds.contains_key("autoencoder"), "{report}");
    assert_eq!(png_size(&dir.path().join("a.png")), (144, 144));
    assert!(ran.stderr.contains("using nexus-tiny"), "{}", ran.stderr);

    // The names of the original's scripts draw the same.
    let old =
        ["--num_inference_steps", "2", "--seed", "7", "--result_path", "b.png", "--enable_cpu_offload", "--quiet"];
    let tiny = tiny_dir().display().to_string();
    let ran = nexus(dir.path(), &[&["generate", "--prompt", PROMPT, "--ckpt_path", &tiny][..], &old].concat());
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    assert!(ran.stdout.ends_with("picture: b.png (144x144, seed 7)\n"), "{}", ran.stdout);
    assert_eq!(fs::read(dir.path().join("a.png")).unwrap(), fs::read(dir.path().join("b.png")).unwrap());
}

#[test]
fn nothing_that_is_there_is_overwritten_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let generate = |more: &[&str]| nexus(dir.path(), &[&["generate", PROMPT, "--steps", "1", "-q"], more].concat());
    for name in ["generation.png", "generation-2.png"] {
        assert!(generate(&[]).stdout.contains(&format!("picture: {name} ")), "{name}");
    }
    let first = dir.path().join("generation.png");
    let before = fs::read(&first).unwrap();
    generate(&["-o", "generation.png", "--seed", "1"])
        .assert_error(2, "generation.png: already there; give another path");
    assert_eq!(fs::read(&first).unwrap(), before);
    assert_eq!(generate(&["-o", "generation.png", "--seed", "1", "--overwrite"]).code, 0);
    assert_ne!(fs::read(&first).unwrap(), before);
    fs::create_dir(dir.path().join("pictures")).unwrap();
    let random = generate(&["-o", "pictures", "--seed", "random", "--json"]).json();
    assert_eq!(random["picture"], "pictures/generation.png");
    assert!(random["seed"].as_u64().is_some(), "{random}");
    let names = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    assert_eq!(names, ["generation-2.png", "generation.png", "pictures"]);
}

#[test]
fn a_picture_is_changed() {
    let dir = tempfile::tempdir().unwrap();
    let picture = tiny_dir().join("sample.png").display().to_string();
    let instruction = "Change the background to pink.";
    let report = nexus(dir.path(), &["edit", &picture, instruction, "--steps", "1", "--json"]).json();
    assert_eq!(report["picture"], "edit.png");
    assert_eq!(report["images"], serde_json::json!([picture]));
    let old = ["--input_image", &picture, "--instruction", instruction, "--num_inference_steps", "1", "-q"];
    let ran = nexus(dir.path(), &[&["edit", "--use_generation_decoder"], &old[..]].concat());
    assert!(ran.stdout.contains("picture: edit-2.png (144x144"), "{}{}", ran.stdout, ran.stderr);
    let read = |name: &str| fs::read(dir.path().join(name)).unwrap();
    assert_ne!(read("edit.png"), read("edit-2.png"));
}

#[test]
fn a_question_is_answered() {
    let dir = tempfile::tempdir().unwrap();
    let picture = tiny_dir().join("sample.png").display().to_string();
    let question = "What colour is the cross?";
    let report = nexus(dir.path(), &["understand", &picture, question, "--json"]).json();
    assert_eq!((&report["reply"], &report["prompt"]), (&"purple".into(), &question.into()));
    assert!(report["prompt_tokens"].as_u64().unwrap() > 81 && report["reply_tokens"].as_u64().unwrap() > 0, "{report}");
    for arguments in
        [&["--input_image", &picture, "--instruction", question][..], &[question], &[question, "-i", &picture]]
    {
        let ran = nexus(dir.path(), &[&["understand", "-q"], arguments].concat());
        assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("purple\n", ""), "{arguments:?}");
    }
    // What the program asks by itself is answered by words.
    let described = nexus(dir.path(), &["understand", "--json"]).json();
    let reply = described["reply"].as_str().unwrap();
    assert!(reply.contains("cross") && !reply.contains("<image>"), "{reply}");
}

/// Neither a reader that is gone nor a full disk keeps a picture back.
#[cfg(target_os = "linux")]
#[test]
fn work_goes_on_when_nobody_listens() {
    let dir = tempfile::tempdir().unwrap();
    let draw = |name: &str, stdout: Stdio, stderr: Stdio| {
        let mut command = command(dir.path(), &["generate", PROMPT, "--steps", "1", "-o", name]);
        let mut child = command.stdin(Stdio::null()).stdout(stdout).stderr(stderr).spawn().unwrap();
        // Nobody reads what was piped.
        drop((child.stdout.take(), child.stderr.take()));
        let code = child.wait().unwrap().code();
        assert_eq!(png_size(&dir.path().join(name)), (144, 144), "{name}");
        code
    };
    let full = || Stdio::from(fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    assert_eq!(draw("gone.png", Stdio::piped(), Stdio::piped()), Some(0));
    assert_eq!(draw("full.png", full(), full()), Some(1), "a result that could not be said is a failure");
    assert_eq!(draw("notes.png", Stdio::null(), full()), Some(0));
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_the_work_at_its_next_event() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = command(dir.path(), &["generate", PROMPT, "--steps", "100000", "-o", "a.png"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_secs(4));
    interrupt(child.id());
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!((ran.code, ran.stdout.as_str()), (130, ""));
    assert!(ran.stderr.ends_with("cancelled\n"), "{}", ran.stderr);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[cfg(unix)]
pub fn interrupt(process: u32) {
    let sent = std::process::Command::new("kill").args(["-INT", &process.to_string()]).status().unwrap();
    assert!(sent.success());
}

#[test]
fn other_models_have_no_sample_picture() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = tiny_dir().display().to_string();
    let ran = nexus(dir.path(), &["edit", "Make it pink.", "--model", &tiny]);
    ran.assert_error(2, "no picture to change");
    assert!(!Path::new("edit.png").exists());
}
