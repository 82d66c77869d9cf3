//! Following a traversal: entered and left modules -> the name of a parameter in the files, and what it is.

use crate::names::WeightNames;

/// Where a traversal is in a module; [`follow_path!`](crate::follow_path) keeps it true.
#[derive(Debug, Default)]
pub struct ModulePath(Vec<Entered>);

#[derive(Debug)]
struct Entered {
    name: String,
    /// Whether it is a part of a module that is called `Linear`.
    of_linear: bool,
}

impl ModulePath {
    /// Name in the files of the parameter at this place.
    pub fn file_name(&self, names: &WeightNames) -> String {
        let entered: Vec<&str> = self.0.iter().map(|entered| entered.name.as_str()).collect();
        names.file_name(&entered.join("."))
    }

    /// Whether the parameter at this place is the weight of a linear layer: of a module that is called `Linear`.
    pub fn is_linear_weight(&self) -> bool {
        self.0.last().is_some_and(|entered| entered.of_linear && entered.name == "weight")
    }

    /// A traversal enters a module or a parameter.
    pub fn enter(&mut self, name: &str, container_type: &str) {
        self.0.push(Entered { name: name.to_string(), of_linear: container_type == "Struct:Linear" });
    }

    /// A traversal leaves what it entered last.
    pub fn leave(&mut self) {
        self.0.pop();
    }
}

/// The part of a visitor or mapper of burn that keeps its field `path`, a [`ModulePath`](crate::ModulePath), true.
#[macro_export]
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
