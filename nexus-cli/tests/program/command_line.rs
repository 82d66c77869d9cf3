//! What the command line says and refuses: help, exit status, errors.

use std::path::Path;

use super::{command, nexus, root};

const SUBCOMMANDS: [&str; 9] =
    ["generate", "edit", "understand", "chat", "inspect", "devices", "verify", "train", "bench"];

#[test]
fn help_teaches() {
    let help = nexus(root(), &["--help"]);
    assert_eq!((help.code, help.stderr.as_str()), (0, ""));
    for name in SUBCOMMANDS {
        assert!(help.stdout.contains(&format!("\n  {name} ")), "{name} is not in {}", help.stdout);
        let help = nexus(root(), &[name, "--help"]);
        assert_eq!((help.code, help.stderr.as_str()), (0, ""), "{name}");
        let teaches = help.stdout.contains("Examples:\n  nexus ");
        assert!(teaches || name == "devices", "{name} has no examples: {}", help.stdout);
    }
    assert!(help.stdout.contains("Exit status: 0 done"), "{}", help.stdout);
    let version = nexus(root(), &["--version"]);
    assert_eq!(version.stdout, format!("nexus {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_wrong_command_line_ends_with_2() {
    for (arguments, text) in [
        (&["draw"][..], "draw"),
        (&["generate", "--stps", "3"], "--steps"),
        (&["generate", "x", "--seed", "many"], "`random`"),
        (&["generate", "x", "--prompt", "y"], "cannot be used with"),
        (&["generate", "--model", "models"], "nothing to draw: say what"),
        (&["generate", "x", "-o", "picture"], "picture: a picture is written as .png, .jpg or .jpeg"),
        (&["generate", "x", "-o", "not/there/a.png"], "not/there/a.png: nothing can be written there"),
        (&["edit", "--model", "models"], "no picture to change"),
        (&["edit", "a.png", "b.png"], "b.png: no such file"),
        (&["edit", "assets/nexus-tiny/sample.png"], "nothing to change: say what"),
        (&["understand", "--model", "models"], "nothing to answer"),
        (&["understand", "cat.png"], "cat.png: no such file"),
        (&["chat", "-o", "not/there"], "not/there: no such directory"),
        (&["train", "--model", "models", "--run", "run"], "RECIPE"),
        (&["verify", "--manifest", "manifests"], "--model"),
        (&["bench", "--stages", "prefill"], "`prefill` is not a stage: use prefill_300, decode_token"),
    ] {
        let ran = nexus(root(), &[arguments, &["-q"]].concat());
        ran.assert_error(2, text);
    }
    let nothing = nexus(root(), &[]);
    assert_eq!((nothing.code, nothing.stdout.as_str()), (2, ""));
    assert!(nothing.stderr.contains("Usage: nexus"), "{}", nothing.stderr);
}

#[test]
fn what_fails_is_said_once_without_a_backtrace() {
    for (arguments, text) in [
        (&["generate", "x", "--model", "not/there"][..], "error: not/there: no such directory\n"),
        (&["generate", "x", "--device", "gpu"], "error: `gpu` is not a device: use cpu, wgpu"),
        (&["understand", "x", "-i", "not/there.png"], "not/there.png"),
        (&["understand", "x", "-i", "Cargo.toml"], "Cargo.toml"),
        (&["edit", "-i", "not/there.png", "--instruction", "x"], "not/there.png"),
        (&["inspect", "tests"], "tests: no Nexus-Gen model here"),
        (&["inspect", "assets/nexus-tiny", "--verify", "not/there"], "not/there/language_model.json"),
        (&["verify", "--model", "not/there"], "not/there: no such directory"),
        (&["train", "not/there.json", "--model", "assets/nexus-tiny", "--run", "not/run"], "not/there.json"),
        (&["bench", "run", "prefill_300", "--device", "gpu"], "`gpu` is not a device"),
    ] {
        let ran = nexus(root(), &[arguments, &["--json", "-q"]].concat());
        ran.assert_error(1, text);
        assert!(!ran.stderr.contains("backtrace"), "{}", ran.stderr);
    }
    let asked =
        command(root(), &["generate", "x", "--model", "not/there"]).env("RUST_BACKTRACE", "1").output().unwrap();
    let text = String::from_utf8(asked.stderr).unwrap();
    assert!(text.contains("  0: "), "{text}");
}

#[test]
fn devices_are_listed() {
    let table = nexus(root(), &["devices"]);
    assert_eq!(table.code, 0);
    assert!(table.stdout.lines().any(|line| line.starts_with("cpu ")), "{}", table.stdout);
    let report = nexus(root(), &["devices", "--json"]).json();
    let cpu = &report["devices"][0];
    assert_eq!((&cpu["name"], &cpu["activations"]), (&"cpu".into(), &"f32".into()));
    assert!(cpu["computes_in"].as_array().unwrap().contains(&"bf16".into()), "{report}");
}

#[test]
fn a_checkpoint_is_inspected() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = super::tiny_dir().display().to_string();
    let table = nexus(dir.path(), &["inspect", &tiny]);
    assert!(table.stdout.contains("\nlanguage_model ") && table.stdout.contains("\nautoencoder "), "{}", table.stdout);
    assert!(table.stdout.contains("and nothing else"), "{}", table.stdout);
    let report = nexus(dir.path(), &["inspect", "--ckpt_path", &tiny, "--manifest", "m", "--tensors", "--json"]).json();
    for stage in report["stages"].as_array().unwrap() {
        let name = stage["stage"].as_str().unwrap();
        assert!(dir.path().join(format!("m/{name}.json")).is_file(), "{name}");
        let (num, listed) = (stage["num_tensors"].as_u64().unwrap(), stage["tensors"].as_array().unwrap().len());
        assert!(num > 0 && num == listed as u64, "{stage}");
        assert!(Path::new(stage["path"].as_str().unwrap()).exists(), "{stage}");
    }
    assert_eq!(nexus(dir.path(), &["inspect", &tiny, "--verify", "m"]).code, 0);
    let random = root().join("assets/nexus-random").display().to_string();
    nexus(dir.path(), &["inspect", &random, "--verify", "m", "--json"])
        .assert_error(1, "not the checkpoint of the manifest");
}
