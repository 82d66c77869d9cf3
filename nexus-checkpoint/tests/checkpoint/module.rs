//! Modules and checkpoints: names, the strict report, dtypes, devices, round trips and manifests.

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::{Initializer, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, DType, Device, Distribution, FloatDType, Int, Tensor, TensorData, bf16, f16};
use nexus_checkpoint::{
    Checkpoint, CheckpointError, LoadDType, LoadOptions, LoadReport, WeightNames, load_module, module_layout,
    save_module, write_safetensors,
};
#[cfg(feature = "manifest")]
use nexus_checkpoint::{Manifest, ManifestDifference};

#[derive(Module, Debug)]
struct Block {
    weight: Param<Tensor<2>>,
    bias: Option<Param<Tensor<1>>>,
}

#[derive(Module, Debug)]
enum Head {
    Plain(Block),
}

#[derive(Module, Debug)]
struct Tower {
    embed: Param<Tensor<2>>,
    blocks: Vec<Block>,
    pair: [Block; 2],
    head: Head,
    none: Option<Block>,
    width: usize,
}

fn weight<const D: usize>(shape: [usize; D], device: &Device) -> Param<Tensor<D>> {
    Initializer::Uniform { min: -1.0, max: 1.0 }.init(shape, device)
}

fn block(out: usize, inn: usize, device: &Device) -> Block {
    let bias = (out % 2 == 1).then(|| weight([out], device));
    Block { weight: weight([out, inn], device), bias }
}

fn tower(sides: [usize; 5], device: &Device) -> Tower {
    let [a, b, c, d, e] = sides;
    Tower {
        embed: weight([a, b], device),
        blocks: vec![block(b, c, device), block(c, d, device), block(d, e, device)],
        pair: [block(e, a, device), block(a, a, device)],
        head: Head::Plain(block(e, b, device)),
        none: None,
        width: a,
    }
}

const NAMES: WeightNames = WeightNames {
    prefix: "model.",
    renames: &[("head.Plain", "lm_head"), ("blocks.*.weight", "layers.*.w"), ("pair", "")],
    unused: &[("extra.", "belongs to another module"), ("buffer", "a constant")],
};

const SIDES: [usize; 5] = [4, 3, 5, 2, 7];

const LAYOUT: [(&str, &[usize]); 11] = [
    ("model.embed", &[4, 3]),
    ("model.layers.0.w", &[3, 5]),
    ("model.blocks.0.bias", &[3]),
    ("model.layers.1.w", &[5, 2]),
    ("model.blocks.1.bias", &[5]),
    ("model.layers.2.w", &[2, 7]),
    ("model.0.weight", &[7, 4]),
    ("model.0.bias", &[7]),
    ("model.1.weight", &[4, 4]),
    ("model.lm_head.weight", &[7, 3]),
    ("model.lm_head.bias", &[7]),
];

fn values(shape: &[usize], seed: usize) -> TensorData {
    let count = shape.iter().product();
    TensorData::new((0..count).map(|i| ((i * 7 + seed * 13) % 101) as f32 / 8.0 - 6.0).collect(), shape.to_vec())
}

/// The tensors that the tower needs.
fn tensors() -> Vec<(String, TensorData)> {
    let tensor = |(seed, (name, shape)): (usize, &(&str, &[usize]))| (name.to_string(), values(shape, seed));
    LAYOUT.iter().enumerate().map(tensor).collect()
}

fn written(tensors: Vec<(String, TensorData)>) -> Checkpoint {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.safetensors");
    write_safetensors(&path, tensors, None).unwrap();
    Checkpoint::open(path).unwrap()
}

/// Everything about the float parameters of a module, in its order.
#[derive(Default)]
struct Params {
    ids: Vec<ParamId>,
    data: Vec<TensorData>,
    initialized: Vec<bool>,
    require_grad: Vec<bool>,
}

impl ModuleVisitor for Params {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.ids.push(param.id);
        self.initialized.push(param.is_initialized());
        self.data.push(param.val().into_data());
        self.require_grad.push(param.is_require_grad());
    }
}

fn params(module: &impl Module) -> Params {
    let mut params = Params::default();
    module.visit(&mut params);
    params
}

fn ids(module: &impl Module) -> Vec<ParamId> {
    struct Ids(Vec<ParamId>);
    impl ModuleVisitor for Ids {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.push(param.id);
        }
    }
    let mut ids = Ids(Vec::new());
    module.visit(&mut ids);
    ids.0
}

fn report(result: Result<Tower, CheckpointError>) -> LoadReport {
    match result {
        Err(CheckpointError::Mismatch(report)) => *report,
        other => panic!("{other:?}"),
    }
}

fn load(checkpoint: &Checkpoint, options: LoadOptions) -> Result<Tower, CheckpointError> {
    load_module(tower(SIDES, &Device::flex()), checkpoint, &NAMES, &options)
}

#[test]
fn the_layout_has_the_names_of_the_files_and_allocates_nothing() {
    let layout = module_layout(&tower(SIDES, &Device::flex()), &NAMES);
    assert_eq!(layout, LAYOUT.map(|(name, shape)| (name.to_string(), shape.to_vec())));

    // 16 TB, if it were allocated.
    let huge = block(1 << 21, 1 << 21, &Device::flex());
    assert_eq!(module_layout(&huge, &WeightNames::default()), [("weight".to_string(), vec![1 << 21, 1 << 21])]);
    let nothing = written(vec![("other".to_string(), values(&[1], 0))]);
    assert!(load_module(huge, &nothing, &WeightNames::default(), &LoadOptions::default()).is_err());
}

#[test]
fn loads_every_parameter_and_keeps_its_identity() {
    let checkpoint = written(tensors());
    let lazy = tower(SIDES, &Device::flex());
    let expected = ids(&lazy);
    let loaded = load_module(lazy, &checkpoint, &NAMES, &LoadOptions::default()).unwrap();
    let params = params(&loaded);
    assert_eq!(params.ids, expected);
    assert!(params.initialized.iter().all(|initialized| *initialized));
    assert_eq!(params.data, tensors().into_iter().map(|(_, data)| data).collect::<Vec<_>>());
    assert_eq!(loaded.width, 4);
}

#[test]
fn weights_of_the_cpu_are_the_mapped_file() {
    let element = 1 << 20;
    let f32s = values(&[element], 1);
    let bf16s = f32s.clone().try_cast(DType::BF16).unwrap();
    for data in [f32s, bf16s] {
        #[derive(Module, Debug)]
        struct One {
            w: Param<Tensor<1>>,
        }
        let dtype = data.dtype();
        let checkpoint = written(vec![("w".to_string(), data)]);
        let module = One { w: weight([element], &Device::flex()) };
        let module = load_module(module, &checkpoint, &WeightNames::default(), &LoadOptions::default()).unwrap();
        assert_eq!(module.w.val().dtype(), dtype);
        let mapped = checkpoint.data("w").unwrap();
        // The only owner of a tensor gives its bytes back without a copy.
        let One { w } = module;
        assert_eq!(w.into_value().into_data().as_bytes().as_ptr(), mapped.as_bytes().as_ptr(), "{dtype:?}");
    }
}

#[test]
fn reports_everything_at_once() {
    let mut tensors = tensors();
    tensors.retain(|(name, _)| name != "model.0.bias" && name != "model.layers.1.w");
    let rename = |name: &mut String, to: &str| *name = to.to_string();
    rename(&mut tensors.iter_mut().find(|(name, _)| name == "model.embed").unwrap().0, "model.embed_tokens");
    tensors.iter_mut().find(|(name, _)| name == "model.1.weight").unwrap().1 = values(&[4, 5], 0);
    tensors.iter_mut().find(|(name, _)| name == "model.lm_head.bias").unwrap().1 = TensorData::new(vec![1i32; 7], [7]);
    for allowed in ["extra.a", "extra.b.c", "buffer"] {
        tensors.push((allowed.to_string(), values(&[1], 0)));
    }
    tensors.push(("buffers".to_string(), values(&[1], 0)));
    let report = report(load(&written(tensors), LoadOptions::default()));

    let missing: Vec<_> = report.missing.iter().map(|m| (m.name.as_str(), m.nearest.as_deref())).collect();
    let expected = [("model.embed", Some("model.embed_tokens")), ("model.layers.1.w", None), ("model.0.bias", None)];
    assert_eq!(missing, expected);
    let unused: Vec<_> = report.unused.iter().map(|u| (u.name.as_str(), u.nearest.as_deref())).collect();
    assert_eq!(unused, [("buffers", None), ("model.embed_tokens", Some("model.embed"))]);
    let [shape] = report.wrong_shape.as_slice() else { panic!("{report}") };
    assert_eq!(
        (shape.name.as_str(), &shape.expected[..], &shape.found[..]),
        ("model.1.weight", &[4, 4][..], &[4, 5][..])
    );
    let [dtype] = report.wrong_dtype.as_slice() else { panic!("{report}") };
    assert_eq!((dtype.name.as_str(), dtype.found), ("model.lm_head.bias", DType::I32));

    let text = report.to_string();
    for line in
        ["w.safetensors", "model.embed [4, 3] (nearest: model.embed_tokens)", "expected [4, 4], found [4, 5]", "i32"]
    {
        assert!(text.contains(line), "{text}");
    }
}

#[test]
fn converts_floats_and_refuses_integers() {
    let checkpoint = written(tensors());
    for (dtype, expected) in
        [(FloatDType::BF16, DType::BF16), (FloatDType::F16, DType::F16), (FloatDType::F64, DType::F64)]
    {
        let options = LoadOptions { dtype: LoadDType::Convert(dtype), check_finite: true, quantization: None };
        let loaded = load(&checkpoint, options).unwrap();
        for (data, (name, original)) in params(&loaded).data.iter().zip(tensors()) {
            assert_eq!(*data, original.try_cast(expected).unwrap(), "{name}");
        }
    }
    let integers = tensors().into_iter().map(|(name, data)| (name, data.try_cast(DType::I64).unwrap())).collect();
    let options = LoadOptions { dtype: LoadDType::Convert(FloatDType::F32), check_finite: false, quantization: None };
    assert_eq!(report(load(&written(integers), options)).wrong_dtype.len(), LAYOUT.len());
}

#[test]
fn finds_values_that_are_not_finite() {
    let mut tensors = tensors();
    let mut bad = vec![1.0f32; 21];
    (bad[3], bad[9]) = (f32::NEG_INFINITY, f32::NAN);
    tensors.iter_mut().find(|(name, _)| name == "model.lm_head.weight").unwrap().1 = TensorData::new(bad, [7, 3]);
    let checkpoint = written(tensors);
    assert!(load(&checkpoint, LoadOptions::default()).is_ok());
    let checked = LoadOptions { check_finite: true, ..Default::default() };
    match load(&checkpoint, checked) {
        Err(CheckpointError::NotFinite { name, file, count: 2, first_index: 3 }) => {
            assert_eq!((name.as_str(), file.as_path()), ("model.lm_head.weight", checkpoint.files()[0].as_path()));
        }
        other => panic!("{other:?}"),
    }

    // Finite in the file and infinite in f16.
    let mut tensors = self::tensors();
    tensors[0].1 = TensorData::new(vec![1e6f32; 12], [4, 3]);
    let options = LoadOptions { dtype: LoadDType::Convert(FloatDType::F16), check_finite: true, quantization: None };
    assert!(matches!(load(&written(tensors), options), Err(CheckpointError::NotFinite { count: 12, .. })));
}

#[test]
fn keeps_what_requires_gradients() {
    let checkpoint = written(tensors());
    let originals: Vec<_> = tensors().into_iter().map(|(_, data)| data).collect();
    let plain = Device::flex();
    for device in [plain.clone(), plain.autodiff()] {
        for (module, trainable) in [(tower(SIDES, &device), true), (tower(SIDES, &device).no_grad(), false)] {
            let loaded = load_module(module, &checkpoint, &NAMES, &LoadOptions::default()).unwrap();
            assert_eq!(params(&loaded).data, originals);
            let tracked = trainable && device.is_autodiff();
            assert!(params(&loaded).require_grad.iter().all(|require_grad| *require_grad == tracked));
            // On a plain device the setting waits for training.
            assert!(params(&loaded.train()).require_grad.iter().all(|require_grad| *require_grad == trainable));
        }
    }
}

#[test]
fn gradients_reach_loaded_weights() {
    let checkpoint = written(tensors());
    let module = tower(SIDES, &Device::flex().autodiff());
    let options = LoadOptions { dtype: LoadDType::Convert(FloatDType::F32), check_finite: true, quantization: None };
    let loaded = load_module(module, &checkpoint, &NAMES, &options).unwrap();
    let embed = loaded.embed.val();
    let grads = embed.clone().powi_scalar(2).sum().backward();
    let expected = embed.inner().mul_scalar(2.0).into_data();
    assert_eq!(loaded.embed.val().grad(&grads).unwrap().into_data(), expected);
}

#[test]
fn shares_one_tensor_between_tied_parameters() {
    #[derive(Module, Debug)]
    struct Tied {
        embed: Param<Tensor<2>>,
        lm_head: Param<Tensor<2>>,
    }
    let names = WeightNames { renames: &[("lm_head", "embed")], ..Default::default() };
    let embed = weight([2, 3], &Device::flex());
    let module = Tied { lm_head: embed.clone(), embed };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.safetensors");
    save_module(&module, &names, &path, None).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.entries().count(), 1);
    let fresh = Tied { embed: weight([2, 3], &Device::flex()), lm_head: weight([2, 3], &Device::flex()) };
    let loaded = load_module(fresh, &checkpoint, &names, &LoadOptions::default()).unwrap();
    assert_eq!(loaded.embed.val().to_data(), loaded.lm_head.val().to_data());
    // Two parameters of one name cannot be saved.
    let two = Tied { embed: weight([2, 3], &Device::flex()), lm_head: weight([2, 3], &Device::flex()) };
    assert!(matches!(save_module(&two, &names, &path, None), Err(CheckpointError::DuplicateTensor { .. })));
}

#[test]
fn loads_integers_and_booleans() {
    #[derive(Module, Debug)]
    struct Buffers {
        ids: Param<Tensor<1, Int>>,
        used: Param<Tensor<1, Bool>>,
    }
    let device = Device::flex();
    let buffers = |ids: [i64; 2], used: [bool; 2]| Buffers {
        ids: Param::initialized(ParamId::new(), Tensor::from_data(ids, (&device, DType::I64))),
        used: Param::initialized(ParamId::new(), Tensor::from_data(used, &device)),
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.safetensors");
    let names = WeightNames::default();
    save_module(&buffers([3, -4], [true, false]), &names, &path, None).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.entry("ids").unwrap().dtype, DType::I64);
    let loaded = load_module(buffers([0, 0], [false, true]), &checkpoint, &names, &LoadOptions::default()).unwrap();
    assert_eq!(loaded.ids.val().into_data().try_to_vec::<i64>().unwrap(), [3, -4]);
    assert_eq!(loaded.used.val().into_data().try_to_vec::<bool>().unwrap(), [true, false]);
    assert!(module_layout(&loaded, &names).is_empty());
}

/// Splits a checkpoint into shards, tensor by tensor in turn.
fn shard(checkpoint: &Checkpoint, num_shards: usize, directory: &Path) -> PathBuf {
    let mut shards = vec![Vec::new(); num_shards];
    for (i, entry) in checkpoint.entries().enumerate() {
        shards[i % num_shards].push((entry.name.clone(), checkpoint.data(&entry.name).unwrap()));
    }
    let mut weight_map = serde_json::Map::new();
    for (i, tensors) in shards.into_iter().enumerate() {
        let name = format!("model-{i}.safetensors");
        weight_map.extend(tensors.iter().map(|(tensor, _)| (tensor.clone(), name.clone().into())));
        write_safetensors(&directory.join(name), tensors, None).unwrap();
    }
    let index = directory.join("model.safetensors.index.json");
    fs::write(&index, serde_json::json!({ "weight_map": weight_map }).to_string()).unwrap();
    index
}

#[test]
fn random_modules_round_trip_bit_by_bit() {
    let device = Device::flex();
    for round in 0..12usize {
        let sides = [1, 2, 3, 4, 5].map(|k| 1 + (round * 31 + k * 17) % 9);
        let dtype = [DType::F32, DType::F16, DType::BF16][round % 3];
        struct Fill(DType);
        impl ModuleMapper for Fill {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let (id, device) = (param.id, param.lazy_device());
                let shape: [usize; D] = param.lazy_shape().dims();
                let random = Tensor::<D>::random(shape, Distribution::Normal(0.0, 3.0), &device);
                let data = random.into_data().try_cast(self.0).unwrap();
                param.transform_for_load(Tensor::from_data(data, (&device, self.0)), id)
            }
        }
        let module = tower(sides, &device).map(&mut Fill(dtype));
        let expected = params(&module).data;

        let directory = tempfile::tempdir().unwrap();
        let single = directory.path().join("single.safetensors");
        save_module(&module, &NAMES, &single, Some([("round".to_string(), round.to_string())].into())).unwrap();
        let single = Checkpoint::open(single).unwrap();
        assert_eq!(single.metadata()["round"], round.to_string());
        let sharded = Checkpoint::open(shard(&single, 1 + round % 4, directory.path())).unwrap();
        for checkpoint in [single, sharded] {
            let loaded = load_module(tower(sides, &device), &checkpoint, &NAMES, &LoadOptions::default()).unwrap();
            let loaded = params(&loaded).data;
            assert!(loaded.iter().all(|data| data.dtype() == dtype));
            let bytes = |data: &[TensorData]| data.iter().map(|d| d.as_bytes().to_vec()).collect::<Vec<_>>();
            assert_eq!(bytes(&loaded), bytes(&expected));
        }
    }
}

#[test]
fn saving_a_module_fails_cleanly() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("absent").join("w.safetensors");
    let module = tower(SIDES, &Device::flex());
    assert!(matches!(save_module(&module, &NAMES, &path, None), Err(CheckpointError::Write { .. })));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[cfg(feature = "manifest")]
#[test]
fn manifests_round_trip_and_count_what_is_not_finite() {
    let mut tensors = tensors();
    tensors[0].1 = TensorData::new(vec![f32::NAN; 12], [4, 3]);
    tensors[1].1 = TensorData::new(vec![f16::INFINITY; 15], [3, 5]);
    tensors[2].1 = TensorData::new(vec![bf16::ONE; 3], [3]);
    let checkpoint = written(tensors);
    let mut seen = Vec::new();
    let manifest = Manifest::of(&checkpoint, &mut |progress| seen.push(progress)).unwrap();
    assert_eq!(seen.len(), LAYOUT.len());
    let last = seen.last().unwrap();
    assert_eq!((last.tensors, last.bytes), (last.total_tensors, checkpoint.num_bytes()));
    let of = |name: &str| manifest.tensors.iter().find(|tensor| tensor.name == name).unwrap();
    assert_eq!((of("model.embed").non_finite, of("model.layers.0.w").non_finite), (12, 15));
    let bias = of("model.blocks.0.bias");
    assert_eq!(
        (bias.non_finite, bias.dtype.as_str(), &bias.shape[..], bias.file.as_str()),
        (0, "BF16", &[3][..], "w.safetensors")
    );
    // printf '\x80\x3f\x80\x3f\x80\x3f' | sha256sum
    assert_eq!(bias.sha256, "dc6a48767bd84de83df12675d0f9e490dfc9f6bfaeb73239f877661961383382");

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("manifest.json");
    manifest.save(&path).unwrap();
    assert_eq!(Manifest::load(&path).unwrap(), manifest);
    manifest.verify(&checkpoint, &mut |_| {}).unwrap();
    let sharded = Checkpoint::open(shard(&checkpoint, 3, directory.path())).unwrap();
    manifest.verify(&sharded, &mut |_| {}).unwrap();
}

#[cfg(feature = "manifest")]
#[test]
fn manifests_name_what_differs() {
    let manifest = Manifest::of(&written(tensors()), &mut |_| {}).unwrap();
    let differences = |tensors: Vec<(String, TensorData)>| match manifest.verify(&written(tensors), &mut |_| {}) {
        Err(error @ CheckpointError::ManifestMismatch { .. }) => {
            assert!(error.to_string().contains("model."), "{error}");
            let CheckpointError::ManifestMismatch { differences, .. } = error else { panic!("{error}") };
            differences
        }
        other => panic!("{other:?}"),
    };
    let mut other_value = tensors();
    other_value[4].1 = values(&[5], 99);
    let expected =
        ManifestDifference::Values { name: "model.blocks.1.bias".to_string(), file: "w.safetensors".to_string() };
    assert_eq!(differences(other_value), [expected]);

    let mut others = tensors();
    others[0].0 = "model.other".to_string();
    others[1].1 = values(&[5, 3], 0);
    others[2].1 = TensorData::new(vec![bf16::ONE; 3], [3]);
    let found: Vec<String> = differences(others).iter().map(|difference| difference.to_string()).collect();
    let expected = [
        "model.blocks.0.bias: expected dtype F32, found BF16",
        "model.embed: missing",
        "model.layers.0.w: expected shape [3, 5], found [5, 3]",
        "model.other: not in the manifest",
    ];
    assert_eq!(found, expected);
}

#[cfg(feature = "manifest")]
#[test]
fn refuses_files_that_are_no_manifest() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("manifest.json");
    assert!(matches!(Manifest::load(&path), Err(CheckpointError::NotFound { .. })));
    fs::write(&path, "{}").unwrap();
    assert!(matches!(Manifest::load(&path), Err(CheckpointError::ManifestJson { .. })));
    fs::write(&path, r#"{"version":99,"tensors":[]}"#).unwrap();
    assert!(matches!(Manifest::load(&path), Err(CheckpointError::ManifestVersion { version: 99, .. })));
    let manifest = Manifest { version: 1, tensors: Vec::new() };
    let absent = directory.path().join("absent").join("manifest.json");
    assert!(matches!(manifest.save(absent), Err(CheckpointError::Write { .. })));
}
