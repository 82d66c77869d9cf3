//! Following a traversal: entered and left modules -> the name of a parameter in the files.

use super::names::WeightNames;

/// Where a traversal is in a module.
#[derive(Default)]
pub(crate) struct ModulePath(pub(crate) Vec<String>);

impl ModulePath {
    /// Name in the files of the parameter at this place.
    pub(crate) fn file_name(&self, names: &WeightNames) -> String {
        names.file_name(&self.0.join("."))
    }
}

/// The part of a visitor or mapper that keeps its field `path` true.
macro_rules! follow_path {
    () => {
        fn enter_module(&mut self, name: &str, _container_type: &str) {
            self.path.0.push(name.to_string());
        }

        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.path.0.pop();
        }
    };
}

pub(crate) use follow_path;
