//! Following a traversal: entered and left modules -> the name of a parameter in the files, and what it is.

use super::names::WeightNames;

/// Where a traversal is in a module.
#[derive(Default)]
pub(crate) struct ModulePath(Vec<Entered>);

struct Entered {
    name: String,
    /// Whether it is a part of a [`Linear`](crate::nn::Linear).
    of_linear: bool,
}

impl ModulePath {
    /// Name in the files of the parameter at this place.
    pub(crate) fn file_name(&self, names: &WeightNames) -> String {
        let entered: Vec<&str> = self.0.iter().map(|entered| entered.name.as_str()).collect();
        names.file_name(&entered.join("."))
    }

    /// Whether the parameter at this place is the weight of a linear layer.
    pub(crate) fn is_linear_weight(&self) -> bool {
        self.0.last().is_some_and(|entered| entered.of_linear && entered.name == "weight")
    }

    pub(crate) fn enter(&mut self, name: &str, container_type: &str) {
        self.0.push(Entered { name: name.to_string(), of_linear: container_type == "Struct:Linear" });
    }

    pub(crate) fn leave(&mut self) {
        self.0.pop();
    }
}

/// The part of a visitor or mapper that keeps its field `path` true.
macro_rules! follow_path {
    () => {
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.path.enter(name, container_type);
        }

        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.path.leave();
        }
    };
}

pub(crate) use follow_path;
