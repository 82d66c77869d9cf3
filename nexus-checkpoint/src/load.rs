//! Modules and checkpoints: a lazy module and an open checkpoint -> the module with its weights, and back to a file.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, DType, Device, ExecutionError, FloatDType, Int, Tensor, TensorData};

use crate::error::CheckpointError;
use crate::follow_path;
use crate::names::WeightNames;
use crate::path::ModulePath;
use crate::quantization::Quantization;
use crate::report::{LoadReport, Missing, Unused, WrongDType, WrongShape};
use crate::values::{self, NonFinite};
use crate::write::{Planned, PlannedFile, native_bool, write_planned};
use crate::{Checkpoint, TensorEntry};

/// Dtype of the float weights after loading.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LoadDType {
    /// The dtype of the file; on the CPU the weights stay in the mapped file.
    #[default]
    AsStored,
    /// Another dtype, rounded to nearest even; one tensor of extra memory at a time.
    Convert(FloatDType),
}

/// How weights are loaded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Dtype of the float weights.
    pub dtype: LoadDType,
    /// Whether to read every weight and refuse NaN and infinity, before and after conversion.
    pub check_finite: bool,
    /// How the weights of linear layers are kept on the device, if not as floats; one tensor of extra memory at a time.
    pub quantization: Option<Quantization>,
}

/// Names in the files and shapes of all float parameters of a module, in the module's order.
///
/// Lazy parameters stay lazy: this allocates no weights, so it works for a module of any size.
pub fn module_layout(module: &impl Module, names: &WeightNames) -> Vec<(String, Vec<usize>)> {
    let floats = needs(module, names).into_iter().filter(|need| need.kind == Kind::Float);
    floats.map(|need| (need.name, need.shape)).collect()
}

/// Loads every parameter of a module from a checkpoint, strictly.
///
/// First everything is compared: each parameter must have a tensor of its name and shape and of a fitting dtype, and
/// each tensor must be used or be listed in [`WeightNames::unused`]. Only then are weights loaded, one by one, to the
/// device on which the parameter is or would be initialised. A parameter keeps its id and whether it requires
/// gradients. Two parameters may share one tensor of the file.
///
/// With [`LoadDType::AsStored`], integer tensors are no float weights, and the weights of a CPU module are the mapped
/// file itself. A quantised parameter becomes a float one.
///
/// # Errors
/// [`CheckpointError::Mismatch`] with every finding; [`CheckpointError::NotFinite`] if asked for;
/// [`CheckpointError::NotBoolean`] or [`CheckpointError::Values`] for values that no header can tell.
pub fn load_module<M: Module>(
    module: M,
    checkpoint: &Checkpoint,
    names: &WeightNames,
    options: &LoadOptions,
) -> Result<M, CheckpointError> {
    check_module(&module, checkpoint, names, options)?;
    let mut loader = Loader { checkpoint, names, options, path: ModulePath::default(), failed: None };
    let module = module.map(&mut loader);
    match loader.failed {
        Some(error) => Err(error),
        None => Ok(module),
    }
}

/// Compares a module with a checkpoint as [`load_module`] does, without loading anything.
///
/// Lazy parameters stay lazy: a whole model can be checked in the time of reading headers.
///
/// # Errors
/// [`CheckpointError::Mismatch`] with every finding.
pub fn check_module(
    module: &impl Module,
    checkpoint: &Checkpoint,
    names: &WeightNames,
    options: &LoadOptions,
) -> Result<(), CheckpointError> {
    let report = compare(&needs(module, names), checkpoint, names, options);
    if report.is_empty() { Ok(()) } else { Err(CheckpointError::Mismatch(Box::new(report))) }
}

/// Writes the parameters of a module as one safetensors file, under their names in the released files and in their
/// own dtypes.
///
/// Tensors are read back and written one by one. A parameter that is still lazy is initialised by this. A parameter
/// that occurs in two places of the module under one name is written once.
///
/// # Errors
/// [`CheckpointError::DuplicateTensor`] if two different parameters have one name,
/// [`CheckpointError::UnsupportedDType`] for a quantised parameter, [`CheckpointError::Values`] if the device fails to
/// give the values back, [`CheckpointError::Write`]. No partial file is left.
pub fn save_module(
    module: &impl Module,
    names: &WeightNames,
    path: &Path,
    metadata: Option<HashMap<String, String>>,
) -> Result<(), CheckpointError> {
    let mut planner = Planner { names, path: ModulePath::default(), planned: Vec::new(), ids: HashMap::new() };
    module.visit(&mut planner);
    write_planned(path, planner.planned, metadata, |file| {
        let mut saver = Saver { names, path: ModulePath::default(), file_path: path, file, failed: None };
        module.visit(&mut saver);
        saver.failed.map_or(Ok(()), Err)
    })
}

/// [`save_module`] with the float parameters rounded to another dtype.
///
/// # Errors
/// As [`save_module`].
pub fn save_module_as<M: Module>(
    module: &M,
    names: &WeightNames,
    path: &Path,
    dtype: FloatDType,
) -> Result<(), CheckpointError> {
    save_module(&module.clone().map(&mut Caster(dtype.into())), names, path, None)
}

/// Rounds the float parameters of a module.
struct Caster(DType);

impl ModuleMapper for Caster {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|value| value.detach().cast(self.0))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Float,
    Int,
    Bool,
}

/// A parameter of a module, under its name in the files.
struct Need {
    name: String,
    shape: Vec<usize>,
    kind: Kind,
    device: Device,
}

fn needs(module: &impl Module, names: &WeightNames) -> Vec<Need> {
    let mut collector = Collector { names, path: ModulePath::default(), needs: Vec::new() };
    module.visit(&mut collector);
    collector.needs
}

/// Everything that keeps the checkpoint from being loaded.
fn compare(needs: &[Need], checkpoint: &Checkpoint, names: &WeightNames, options: &LoadOptions) -> LoadReport {
    let mut report = LoadReport { files: checkpoint.files().to_vec(), ..Default::default() };
    let mut used = HashSet::with_capacity(needs.len());
    for need in needs {
        let Need { name, shape, .. } = need;
        let Some(entry) = checkpoint.entry(name) else {
            report.missing.push(Missing { name: name.clone(), shape: shape.clone(), nearest: None });
            continue;
        };
        used.insert(name.as_str());
        if entry.shape != *shape {
            let (expected, found) = (shape.clone(), entry.shape.clone());
            report.wrong_shape.push(WrongShape { name: name.clone(), expected, found });
        }
        if let Some((expected, found)) = dtype_problem(need, entry, options) {
            report.wrong_dtype.push(WrongDType { name: name.clone(), expected, found });
        }
    }
    let leftover = checkpoint.entries().map(|entry| entry.name.as_str()).filter(|name| !used.contains(name));
    let leftover: Vec<&str> = leftover.collect();
    let unused = leftover.iter().filter(|name| !names.may_be_unused(name));
    report.unused = unused.map(|name| Unused { name: name.to_string(), nearest: None }).collect();
    report.find_nearest(&leftover);
    report
}

/// What was expected and what was found, if the tensor cannot become the parameter.
fn dtype_problem(need: &Need, entry: &TensorEntry, options: &LoadOptions) -> Option<(&'static str, DType)> {
    let stored = entry.dtype;
    let (fits, expected) = match need.kind {
        Kind::Float => (stored.is_float(), "a float dtype"),
        Kind::Int => (stored.is_int() || stored.is_uint(), "an integer dtype"),
        Kind::Bool => (stored.is_bool(), "booleans"),
    };
    if !fits {
        return Some((expected, stored));
    }
    let loaded = loaded_dtype(need.kind, stored, options);
    // Every device converts booleans to its own width.
    let holds = need.kind == Kind::Bool || need.device.supports_dtype(loaded);
    (!holds).then_some(("a dtype that the device supports (convert with LoadDType::Convert)", loaded))
}

fn loaded_dtype(kind: Kind, stored: DType, options: &LoadOptions) -> DType {
    match (kind, options.dtype) {
        (Kind::Float, LoadDType::Convert(dtype)) => dtype.into(),
        _ => stored,
    }
}

/// Collects what a module needs without initialising it.
struct Collector<'a> {
    names: &'a WeightNames,
    path: ModulePath,
    needs: Vec<Need>,
}

impl Collector<'_> {
    fn push(&mut self, shape: &[usize], kind: Kind, device: Device) {
        self.needs.push(Need { name: self.path.file_name(self.names), shape: shape.to_vec(), kind, device });
    }
}

impl ModuleVisitor for Collector<'_> {
    follow_path!();

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.push(param.lazy_shape().as_slice(), Kind::Float, param.lazy_device());
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.push(param.lazy_shape().as_slice(), Kind::Int, param.lazy_device());
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.push(param.lazy_shape().as_slice(), Kind::Bool, param.lazy_device());
    }
}

/// Fills a module from a checkpoint that was found to fit; stops at the first failure.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    names: &'a WeightNames,
    options: &'a LoadOptions,
    path: ModulePath,
    failed: Option<CheckpointError>,
}

impl Loader<'_> {
    /// Values of the parameter at the current path; `None` once something failed.
    fn values(&mut self, kind: Kind) -> Option<TensorData> {
        if self.failed.is_some() {
            return None;
        }
        self.try_values(kind).map_err(|error| self.failed = Some(error)).ok()
    }

    fn try_values(&self, kind: Kind) -> Result<TensorData, CheckpointError> {
        let name = self.path.file_name(self.names);
        let data = self.checkpoint.data(&name)?;
        let file = || self.checkpoint.entry(&name).map(|entry| entry.file.clone()).unwrap_or_default();
        let dtype = loaded_dtype(kind, data.dtype(), self.options);
        let data = match kind {
            Kind::Float => values::convert(data, dtype).map_err(|reason| CheckpointError::Values {
                path: file(),
                name: name.clone(),
                reason,
            })?,
            Kind::Int | Kind::Bool => data,
        };
        if self.options.check_finite {
            // Conversion keeps NaN and infinity and may add infinity, so looking once afterwards is enough.
            let NonFinite { count, first_index } = values::non_finite(data.as_bytes(), dtype);
            if count > 0 {
                return Err(CheckpointError::NotFinite { file: file(), name, count, first_index });
            }
        }
        Ok(data)
    }
}

impl ModuleMapper for Loader<'_> {
    follow_path!();

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(data) = self.values(Kind::Float) else { return param };
        let device = param.lazy_device();
        let dtype = data.dtype();
        let place = |data: TensorData| Tensor::from_data(data, (&device, dtype));
        let tensor = match self.options.quantization.filter(|_| self.path.is_linear_weight()) {
            // The floats are not here to stay.
            Some(quantization) => {
                device.memory_persistent_allocations(place(data), |floats| quantization.quantize(floats))
            }
            None => device.memory_persistent_allocations(data, place),
        };
        let id = param.id;
        param.transform_for_load(tensor, id)
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        let Some(data) = self.values(Kind::Int) else { return param };
        let (device, dtype) = (param.lazy_device(), data.dtype());
        let id = param.id;
        param.transform_for_load(Tensor::from_data(data, (&device, dtype)), id)
    }

    fn map_bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        let Some(data) = self.values(Kind::Bool) else { return param };
        let device = param.lazy_device();
        let id = param.id;
        param.transform_for_load(Tensor::from_data(data, &device), id)
    }
}

/// Collects name, shape and dtype of what will be written; initialises lazy parameters.
struct Planner<'a> {
    names: &'a WeightNames,
    path: ModulePath,
    planned: Vec<Planned>,
    ids: HashMap<String, ParamId>,
}

impl Planner<'_> {
    fn plan(&mut self, id: ParamId, shape: &[usize], dtype: DType) {
        let name = self.path.file_name(self.names);
        // A tied parameter is one tensor; two parameters of one name are an error, which the writer reports.
        if self.ids.insert(name.clone(), id) != Some(id) {
            let dtype = if dtype.is_bool() { values::BOOL } else { dtype };
            self.planned.push(Planned { name, shape: shape.to_vec(), dtype });
        }
    }
}

impl ModuleVisitor for Planner<'_> {
    follow_path!();

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.plan(param.id, param.lazy_shape().as_slice(), param.base().dtype());
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.plan(param.id, param.lazy_shape().as_slice(), param.base().dtype());
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.plan(param.id, param.lazy_shape().as_slice(), param.base().dtype());
    }
}

/// Reads parameters back and puts them into a planned file; stops at the first failure.
struct Saver<'a, 'b> {
    names: &'a WeightNames,
    path: ModulePath,
    file_path: &'a Path,
    file: &'a mut PlannedFile<'b>,
    failed: Option<CheckpointError>,
}

impl Saver<'_, '_> {
    fn put(&mut self, read: impl FnOnce() -> Result<TensorData, ExecutionError>) {
        if self.failed.is_none() {
            self.failed = self.try_put(read).err();
        }
    }

    fn try_put(&mut self, read: impl FnOnce() -> Result<TensorData, ExecutionError>) -> Result<(), CheckpointError> {
        let name = self.path.file_name(self.names);
        let data = read().map_err(|source| CheckpointError::Values {
            path: self.file_path.to_path_buf(),
            name: name.clone(),
            reason: format!("cannot be read from the device: {source:?}"),
        })?;
        let data = native_bool(self.file_path, &name, data)?;
        self.file.put(&name, data.as_bytes())
    }
}

impl ModuleVisitor for Saver<'_, '_> {
    follow_path!();

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.put(|| param.base().try_into_data());
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.put(|| param.base().try_into_data());
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.put(|| param.base().try_into_data());
    }
}
