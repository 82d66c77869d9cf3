//! Conversations: commands, mistakes that do not end them, and pictures that are kept.

use std::fs;

use super::{png_size, tiny_dir, typing};

const DRAW: &str = "Generate an image according to the following description: a blue circle";

#[test]
fn a_conversation_draws_and_answers() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("chat.png"), "mine").unwrap();
    let lines = format!("{DRAW}\nWhat colour is the circle?\n");
    let ran = typing(dir.path(), &["chat", "--steps", "8", "-q"], lines.as_bytes());
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    assert!(ran.stdout.contains("picture: chat-2.png\n"), "{}", ran.stdout);
    assert!(ran.stdout.ends_with("blue\n"), "{}", ran.stdout);
    assert_eq!(png_size(&dir.path().join("chat-2.png")), (144, 144));
    assert_eq!(fs::read(dir.path().join("chat.png")).unwrap(), b"mine");
}

#[test]
fn a_program_reads_one_object_per_message() {
    let dir = tempfile::tempdir().unwrap();
    let picture = tiny_dir().join("sample.png");
    fs::copy(picture, dir.path().join("my sample.png")).unwrap();
    let lines = "/image \"my sample.png\"\nWhat colour is the cross?\nWhat does the <image> tag do?\n\nWhat colour is the cross?\n";
    let ran = typing(dir.path(), &["chat", "--json", "-q"], lines.as_bytes());
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let turns: Vec<serde_json::Value> = ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(turns.len(), 3, "{}", ran.stdout);
    for answered in [&turns[0], &turns[2]] {
        assert_eq!(answered["reply"], serde_json::json!([{"text": "purple"}]));
        assert!(answered["seconds"]["total"].as_f64().unwrap() > 0.0, "{answered}");
    }
    assert!(turns[1]["error"].as_str().unwrap().contains("image"), "{}", turns[1]);
    assert!(turns[1]["reply"].is_null());
}

#[test]
fn a_mistake_is_said_and_the_next_line_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let lines = b"/help\n/draw a circle\n/image\n/image not/there.png\n\xff\xfe\n/quit\nWhat colour is the cross?\n";
    let ran = typing(dir.path(), &["chat"], lines);
    assert_eq!((ran.code, ran.stdout.as_str()), (0, ""));
    for text in ["/image PATH", "error: /draw is no command; /help", "needs the path", "not/there.png", "not UTF-8"] {
        assert!(ran.stderr.contains(text), "`{text}` is not in {}", ran.stderr);
    }
    assert_eq!(ran.stderr.matches("error:").count(), 4, "{}", ran.stderr);
}

#[test]
fn a_conversation_is_kept_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let lines = format!("{DRAW}\n/save \"my chat.safetensors\"\n/save my\\ chat.safetensors\n");
    let ran = typing(dir.path(), &["chat", "--steps", "8"], lines.as_bytes());
    assert_eq!(ran.code, 0);
    assert!(ran.stderr.contains("conversation: my chat.safetensors\n"), "{}", ran.stderr);
    assert!(ran.stderr.contains("error: my chat.safetensors: already there"), "{}", ran.stderr);
    let arguments = ["chat", "--conversation", "my chat.safetensors", "-q"];
    let ran = typing(dir.path(), &arguments, b"What colour is the circle?\n");
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (0, "blue\n", ""));
    let ran = typing(dir.path(), &["chat", "-c", "not/there", "-q"], b"");
    ran.assert_error(1, "not/there");
}

#[cfg(unix)]
#[test]
fn an_interrupt_between_messages_ends_the_program() {
    use std::{io::Read, process::Stdio, thread, time::Duration};
    let mut command = super::command(&std::env::temp_dir(), &["chat"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    thread::sleep(Duration::from_secs(4));
    super::pictures::interrupt(child.id());
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!((child.wait().unwrap().code(), said.as_str()), (Some(130), ""));
}
