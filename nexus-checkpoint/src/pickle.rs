//! Reading the pickle of a `torch.save` archive without running it: bytes -> names and descriptions of tensors.
//!
//! A pickle is a program for a small stack machine that may name any Python function and have it called. This machine
//! knows the opcodes of protocol 2 that describe a dictionary of tensors, and the few names that torch uses for them;
//! everything else is an error. Objects live in one flat list and refer to each other by index, so that deep or
//! circular structures cost no recursion, and every count is limited.
//!
//! Source: CPython `pickletools.py` (opcodes); PyTorch `torch/serialization.py` and `torch/_utils.py` (persistent ids,
//! `_rebuild_tensor_v2`).

use std::collections::{HashMap, HashSet};
use std::path::Path;

use burn::tensor::DType;

use crate::error::CheckpointError;
use crate::values::BOOL;

/// Longest pickle, in bytes; the largest released one has 0.1 MB.
const MAX_PICKLE: usize = 64 << 20;
/// Most objects, memo entries, stack entries and marks.
const MAX_OBJECTS: usize = 1_000_000;
/// Most dimensions of a tensor.
///
/// Shapes and storage names are copied out of shared objects, so without a limit a short pickle could ask for a lot
/// of memory.
const MAX_RANK: usize = 16;
/// Longest name of a storage, in bytes; torch numbers them.
const MAX_STORAGE_NAME: usize = 64;

/// A tensor as the pickle describes it; nothing is checked against the storage yet.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PickledTensor {
    /// Name of the storage: the entry `data/<storage>` of the archive.
    pub storage: String,
    /// Elements of the storage.
    pub storage_len: u64,
    /// Dtype of the storage.
    pub dtype: DType,
    /// First element.
    pub offset: u64,
    /// Shape.
    pub shape: Vec<usize>,
    /// Strides in elements, as many as the shape has dimensions.
    pub strides: Vec<usize>,
}

/// Reads a pickled dictionary of tensors.
///
/// # Errors
/// [`CheckpointError::ForeignGlobal`], [`CheckpointError::Pickle`], [`CheckpointError::NotATensor`],
/// [`CheckpointError::DuplicateTensor`].
pub(super) fn read(path: &Path, pickle: &[u8]) -> Result<Vec<(String, PickledTensor)>, CheckpointError> {
    let mut machine = Machine { pickle, ..Default::default() };
    let result = match pickle.len() {
        0..=MAX_PICKLE => machine.run(),
        long => Err(Stop::Malformed(format!("{long} bytes are too many"))),
    };
    let items = result.map_err(|stop| match stop {
        Stop::Malformed(reason) => CheckpointError::Pickle { path: path.to_path_buf(), at: machine.at, reason },
        Stop::Foreign(global) => CheckpointError::ForeignGlobal { path: path.to_path_buf(), global },
    })?;

    let mut names = HashSet::with_capacity(items.len());
    let mut tensors = Vec::with_capacity(items.len());
    for (key, value) in items {
        match (&machine.objects[key], &machine.objects[value]) {
            (Object::Text(name), Object::Tensor(tensor)) => {
                if !names.insert(*name) {
                    return Err(CheckpointError::DuplicateTensor {
                        path: path.to_path_buf(),
                        tensor: name.to_string(),
                    });
                }
                tensors.push((name.to_string(), (**tensor).clone()));
            }
            (key, _) => return Err(CheckpointError::NotATensor { path: path.to_path_buf(), key: key.describe() }),
        }
    }
    Ok(tensors)
}

/// Index of an object.
type Id = usize;

enum Object<'a> {
    None,
    Bool,
    Int(i64),
    Float,
    Text(&'a str),
    Tuple(Vec<Id>),
    List,
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage { name: &'a str, len: u64, dtype: DType },
    Tensor(Box<PickledTensor>),
}

impl Object<'_> {
    fn describe(&self) -> String {
        match self {
            Self::None => "None".to_string(),
            Self::Bool => "a bool".to_string(),
            Self::Int(value) => value.to_string(),
            Self::Float => "a float".to_string(),
            Self::Text(text) => text.chars().take(200).collect(),
            Self::Tuple(_) => "a tuple".to_string(),
            Self::List => "a list".to_string(),
            Self::Dict(_) => "a dictionary".to_string(),
            Self::Global(_) => "a function".to_string(),
            Self::Storage { .. } => "a storage".to_string(),
            Self::Tensor(_) => "a tensor".to_string(),
        }
    }
}

#[derive(Clone, Copy)]
enum Global {
    RebuildTensor,
    OrderedDict,
    StorageType(DType),
}

/// The names that a checkpoint of plain tensors needs.
fn global(module: &str, name: &str) -> Option<Global> {
    Some(match (module, name) {
        ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
        ("collections", "OrderedDict") => Global::OrderedDict,
        ("torch", "DoubleStorage") => Global::StorageType(DType::F64),
        ("torch", "FloatStorage") => Global::StorageType(DType::F32),
        ("torch", "HalfStorage") => Global::StorageType(DType::F16),
        ("torch", "BFloat16Storage") => Global::StorageType(DType::BF16),
        ("torch", "LongStorage") => Global::StorageType(DType::I64),
        ("torch", "IntStorage") => Global::StorageType(DType::I32),
        ("torch", "ShortStorage") => Global::StorageType(DType::I16),
        ("torch", "CharStorage") => Global::StorageType(DType::I8),
        ("torch", "ByteStorage") => Global::StorageType(DType::U8),
        ("torch", "BoolStorage") => Global::StorageType(BOOL),
        _ => return None,
    })
}

/// Why the machine stopped before the end.
enum Stop {
    Malformed(String),
    Foreign(String),
}

impl From<&str> for Stop {
    fn from(reason: &str) -> Self {
        Self::Malformed(reason.to_string())
    }
}

#[derive(Default)]
struct Machine<'a> {
    pickle: &'a [u8],
    /// Position of the next byte.
    at: usize,
    objects: Vec<Object<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack at open marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    /// Runs to the end; gives the items of the dictionary that is left.
    fn run(&mut self) -> Result<Vec<(Id, Id)>, Stop> {
        let [first, protocol] = self.take()?;
        if first != 0x80 || protocol != 2 {
            return Err("only protocol 2, the default of torch.save, is read".into());
        }
        loop {
            let counts = [self.objects.len(), self.stack.len(), self.marks.len(), self.memo.len()];
            if counts.into_iter().any(|count| count > MAX_OBJECTS) {
                return Err("too many objects".into());
            }
            let [opcode] = self.take()?;
            match opcode {
                b'.' => return self.finish(),
                b'(' => self.marks.push(self.stack.len()),
                b'N' => self.push(Object::None),
                0x88 | 0x89 => self.push(Object::Bool),
                b'K' => {
                    let value = i64::from(u8::from_le_bytes(self.take()?));
                    self.push(Object::Int(value));
                }
                b'M' => {
                    let value = i64::from(u16::from_le_bytes(self.take()?));
                    self.push(Object::Int(value));
                }
                b'J' => {
                    let value = i64::from(i32::from_le_bytes(self.take()?));
                    self.push(Object::Int(value));
                }
                0x8a => {
                    let value = self.long()?;
                    self.push(Object::Int(value));
                }
                b'G' => {
                    self.take::<8>()?;
                    self.push(Object::Float);
                }
                b'X' => {
                    let text = self.text()?;
                    self.push(Object::Text(text));
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    let global = global(module, name).ok_or_else(|| Stop::Foreign(format!("{module}.{name}")))?;
                    self.push(Object::Global(global));
                }
                b']' => self.push(Object::List),
                b'}' => self.push(Object::Dict(Vec::new())),
                b')' => self.push(Object::Tuple(Vec::new())),
                0x85..=0x87 => {
                    let items = self.pop_many(usize::from(opcode - 0x84))?;
                    self.push(Object::Tuple(items));
                }
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.push(Object::Tuple(items));
                }
                b'a' | b'e' => {
                    // What lists hold is never asked for.
                    match opcode {
                        b'a' => self.pop_many(1)?,
                        _ => self.pop_to_mark()?,
                    };
                    if !matches!(self.top()?, Object::List) {
                        return Err("something is appended to what is no list".into());
                    }
                }
                b's' => {
                    let items = self.pop_many(2)?;
                    self.set_items(&items)?;
                }
                b'u' => {
                    let items = self.pop_to_mark()?;
                    self.set_items(&items)?;
                }
                b'q' => {
                    let [key] = self.take()?;
                    self.remember(u32::from(key))?;
                }
                b'r' => {
                    let key = u32::from_le_bytes(self.take()?);
                    self.remember(key)?;
                }
                b'h' => {
                    let [key] = self.take()?;
                    self.recall(u32::from(key))?;
                }
                b'j' => {
                    let key = u32::from_le_bytes(self.take()?);
                    self.recall(key)?;
                }
                b'Q' => self.persistent()?,
                b'R' => self.reduce()?,
                b'b' => {
                    // Attributes of an OrderedDict: the `_metadata` of `state_dict()`, which says nothing of tensors.
                    self.pop()?;
                    if !matches!(self.top()?, Object::Dict(_)) {
                        return Err("attributes are set on something that is no dictionary".into());
                    }
                }
                other => return Err(Stop::Malformed(format!("opcode {other:#04x} has no place in a checkpoint"))),
            }
        }
    }

    fn finish(&mut self) -> Result<Vec<(Id, Id)>, Stop> {
        match self.top()? {
            Object::Dict(items) => Ok(std::mem::take(items)),
            other => Err(Stop::Malformed(format!("it holds {} and not a dictionary of tensors", other.describe()))),
        }
    }

    /// Makes a storage of its id: `("storage", type, name, location, length)`.
    fn persistent(&mut self) -> Result<(), Stop> {
        let id = self.pop()?;
        let Object::Tuple(fields) = &self.objects[id] else { return Err("a persistent id is no tuple".into()) };
        let &[kind, dtype, name, _location, len] = fields.as_slice() else {
            return Err("a persistent id has not five fields".into());
        };
        match [kind, dtype, name, len].map(|id| &self.objects[id]) {
            [
                Object::Text("storage"),
                Object::Global(Global::StorageType(dtype)),
                Object::Text(name),
                Object::Int(len),
            ] => {
                let len = u64::try_from(*len).map_err(|_| Stop::from("a storage has a negative length"))?;
                if name.len() > MAX_STORAGE_NAME {
                    return Err("a storage has too long a name".into());
                }
                let storage = Object::Storage { name, len, dtype: *dtype };
                self.push(storage);
                Ok(())
            }
            _ => Err("a persistent id describes no storage".into()),
        }
    }

    /// Calls one of the two functions that there are.
    fn reduce(&mut self) -> Result<(), Stop> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Object::Tuple(arguments) = &self.objects[arguments] else { return Err("arguments are no tuple".into()) };
        let object = match &self.objects[function] {
            Object::Global(Global::OrderedDict) if arguments.is_empty() => Object::Dict(Vec::new()),
            Object::Global(Global::RebuildTensor) => Object::Tensor(Box::new(self.rebuild(arguments)?)),
            other => return Err(Stop::Malformed(format!("{} cannot be called like this", other.describe()))),
        };
        self.push(object);
        Ok(())
    }

    /// `_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks[, metadata])`.
    fn rebuild(&self, arguments: &[Id]) -> Result<PickledTensor, Stop> {
        let (&[storage, offset, shape, strides], 2 | 3) =
            (arguments.first_chunk().ok_or("a tensor lacks arguments")?, arguments.len().saturating_sub(4))
        else {
            return Err("a tensor has a wrong number of arguments".into());
        };
        let Object::Storage { name, len, dtype } = &self.objects[storage] else {
            return Err("a tensor has no storage".into());
        };
        let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
        if shape.len() != strides.len() {
            return Err("shape and strides of a tensor differ in length".into());
        }
        let (storage, storage_len, dtype) = (name.to_string(), *len, *dtype);
        Ok(PickledTensor { storage, storage_len, dtype, offset: self.size(offset)? as u64, shape, strides })
    }

    fn sizes(&self, id: Id) -> Result<Vec<usize>, Stop> {
        match &self.objects[id] {
            Object::Tuple(items) if items.len() <= MAX_RANK => items.iter().map(|&item| self.size(item)).collect(),
            Object::Tuple(_) => Err("a tensor has too many dimensions".into()),
            _ => Err("a shape is no tuple".into()),
        }
    }

    fn size(&self, id: Id) -> Result<usize, Stop> {
        match &self.objects[id] {
            Object::Int(value) => usize::try_from(*value).map_err(|_| "a size is negative".into()),
            _ => Err("a size is no number".into()),
        }
    }

    fn set_items(&mut self, items: &[Id]) -> Result<(), Stop> {
        let (pairs, []) = items.as_chunks::<2>() else { return Err("a dictionary key has no value".into()) };
        match self.top()? {
            Object::Dict(dict) => {
                dict.extend(pairs.iter().map(|[key, value]| (*key, *value)));
                Ok(())
            }
            _ => Err("items are set on something that is no dictionary".into()),
        }
    }

    fn push(&mut self, object: Object<'a>) {
        self.stack.push(self.objects.len());
        self.objects.push(object);
    }

    /// Takes the last object, which must be above the last mark.
    fn pop(&mut self) -> Result<Id, Stop> {
        if self.stack.len() <= self.marks.last().copied().unwrap_or(0) {
            return Err("the stack is empty".into());
        }
        self.stack.pop().ok_or("the stack is empty".into())
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Id>, Stop> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len().checked_sub(count) {
            Some(keep) if keep >= floor => Ok(self.stack.split_off(keep)),
            _ => Err("the stack is empty".into()),
        }
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, Stop> {
        let mark = self.marks.pop().ok_or("a mark is absent")?;
        // `pop` never goes below the last mark, so the stack is at least this high.
        Ok(self.stack.split_off(mark))
    }

    fn top(&mut self) -> Result<&mut Object<'a>, Stop> {
        let id = self.stack.last().copied().ok_or("the stack is empty")?;
        Ok(&mut self.objects[id])
    }

    fn remember(&mut self, key: u32) -> Result<(), Stop> {
        let id = self.stack.last().copied().ok_or("the stack is empty")?;
        self.memo.insert(key, id);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<(), Stop> {
        let id = self.memo.get(&key).copied().ok_or("an object is recalled that was never remembered")?;
        self.stack.push(id);
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let bytes = self.pickle.get(self.at..).and_then(|rest| rest.first_chunk());
        let bytes = *bytes.ok_or("it is cut")?;
        self.at += N;
        Ok(bytes)
    }

    fn take_slice(&mut self, len: usize) -> Result<&'a [u8], Stop> {
        let bytes = self.pickle.get(self.at..).and_then(|rest| rest.get(..len)).ok_or("it is cut")?;
        self.at += len;
        Ok(bytes)
    }

    /// A little-endian two's complement number of any length up to eight bytes.
    fn long(&mut self) -> Result<i64, Stop> {
        let [len] = self.take()?;
        let bytes = self.take_slice(usize::from(len))?;
        if bytes.len() > 8 {
            return Err("a number does not fit in 64 bits".into());
        }
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        Ok(i64::from_le_bytes(wide))
    }

    fn text(&mut self) -> Result<&'a str, Stop> {
        let len = u32::from_le_bytes(self.take()?);
        let bytes = self.take_slice(len as usize)?;
        std::str::from_utf8(bytes).map_err(|_| "a text is not UTF-8".into())
    }

    fn line(&mut self) -> Result<&'a str, Stop> {
        let rest = self.pickle.get(self.at..).unwrap_or_default();
        let len = rest.iter().take(1000).position(|&byte| byte == b'\n').ok_or("a name has no end")?;
        let bytes = self.take_slice(len)?;
        self.at += 1;
        std::str::from_utf8(bytes).map_err(|_| "a name is not UTF-8".into())
    }
}
