//! The recipes of nexus-tiny: all are read, know their sources, and say their own command.

use std::{fs, path::Path};

use lab_tiny::WorldSource;
use nexus_train::Recipe;
use serde_json::Value;

/// Settings of every source `world` in a recipe.
fn worlds(recipe: &Value) -> Vec<Value> {
    let phases = recipe["train"]["phases"].as_array().unwrap();
    let data = phases.iter().flat_map(|phase| phase["data"].as_array().unwrap());
    data.filter_map(|data| data["source"].get("world").cloned()).collect()
}

#[test]
fn the_recipes_are_read_and_say_their_own_command() {
    let (lab, mut count) = (Path::new(env!("CARGO_MANIFEST_DIR")), 0);
    let mut dirs = vec![lab.join("recipes")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
                continue;
            }
            let recipe = Recipe::read(&path).unwrap_or_else(|error| panic!("{error}"));
            let name = path.strip_prefix(lab).unwrap().to_str().unwrap().replace('\\', "/");
            assert!(recipe.command.contains(&format!("--recipe lab/tiny/{name} ")), "{name}: {}", recipe.command);
            let worlds = worlds(&serde_json::to_value(&recipe).unwrap());
            assert!(!worlds.is_empty(), "{name}");
            for settings in worlds {
                WorldSource::open(&settings).unwrap_or_else(|error| panic!("{name}: {error}"));
            }
            count += 1;
        }
    }
    assert!(count > 15, "only {count} recipes were found");
}
