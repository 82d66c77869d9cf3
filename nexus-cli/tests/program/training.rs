//! `nexus train` from the command line; what a run does is tested where runs are.

use super::{nexus, root, tiny_dir};

#[test]
fn a_recipe_that_cannot_be_read_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = root().join("Cargo.toml").display().to_string();
    let tiny = tiny_dir().display().to_string();
    let ran = nexus(dir.path(), &["train", "--recipe", &recipe, "--model", &tiny, "--run", "run", "--json"]);
    ran.assert_error(1, "Cargo.toml");
    assert!(!dir.path().join("run").exists());
}
