//! `nexus bench`: names, one stage in a process of its own, and the table.

use std::fs;

use super::nexus;

const STAGE: &str = "vision_252";

#[test]
fn stages_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let report = nexus(dir.path(), &["bench", "list", "--json"]).json();
    let names = report["stages"].as_array().unwrap();
    assert!(names.contains(&STAGE.into()) && names.contains(&"ar_training_step".into()), "{report}");
    let lines = nexus(dir.path(), &["bench", "list"]).stdout;
    assert_eq!(lines.lines().count(), names.len());
}

#[test]
fn a_stage_is_timed_on_every_device() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = ["bench", "--devices", "cpu,cpu:0", "--stages", STAGE, "--runs", "1", "--seconds", "1"];
    let report = nexus(dir.path(), &[&arguments[..], &["--json"]].concat()).json();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2, "{report}");
    for row in rows {
        assert_eq!((&row["stage"], &row["error"]), (&STAGE.into(), &serde_json::Value::Null));
        assert!(row["measured"]["seconds"].as_f64().unwrap() > 0.0, "{row}");
    }
    assert_eq!(rows[1]["measured"]["drift"], 0.0, "the same device twice");
    let table = fs::read_to_string(dir.path().join(report["table"].as_str().unwrap())).unwrap();
    assert_eq!(table.matches(STAGE).count(), 2, "{table}");
    assert!(fs::read_to_string(dir.path().join("backends/backends.svg")).unwrap().contains("</svg>"));
    assert_eq!(fs::read_dir(dir.path().join("backends")).unwrap().count(), 3);
    nexus(dir.path(), &arguments).assert_error(2, "already there");
}
