//! The pages of the book as documentation: their Rust code is compiled, and most of it run, by `cargo test --doc`.

macro_rules! pages {
    ($($page:ident: $file:literal),+ $(,)?) => {
        $(
            #[cfg(doctest)]
            #[doc = include_str!($file)]
            pub mod $page {}
        )+
    };
}

pages! {
    add_a_backend: "src/add-a-backend.md",
    add_an_operation: "src/add-an-operation.md",
    converse: "src/converse.md",
    devices: "src/devices.md",
    introduction: "src/introduction.md",
    readme: "../README.md",
    start: "src/start.md",
    train: "src/train.md",
    weights: "src/weights.md",
}
