//! Data for training: files of conversations, mixtures of sources, and what becomes of bad samples.
//!
//! [`MessagesFile`] and [`MessagesWriter`] read and write conversations; [`Mixture`] says for each number of a run which
//! sample of which source comes; [`RejectedSamples`] sets samples aside that cannot be used.

mod messages_file;
mod messages_writer;
mod mixture;
mod permutation;
mod rejected;

pub use messages_file::MessagesFile;
pub use messages_writer::MessagesWriter;
pub use mixture::{Mixture, Pick};
pub use permutation::Permutation;
pub use rejected::RejectedSamples;
