//! The quantised formats of Hugging Face folders, one file each, as matrices that devices know.
//!
//! A format stores a matrix in several tensors: packed numbers, scales, sometimes zero points and
//! an order of inputs. Each file finds the matrices of its format in a folder and describes them
//! in one of two forms: [`Integers`](integers::Integers) with scales, or
//! [`Floats`](floats::Floats) with scales. The model builder sees a matrix as one tensor with the
//! usual name.
//!
//! Integers whose scales are float16 numbers are read as blocks of Q4_0, Q5_0 or Q8_0, which hold
//! the same weights exactly. FP8 numbers whose scales are powers of two are expanded to bfloat16,
//! and everything else to float32.

mod awq;
mod compressed_tensors;
mod floats;
mod fp8;
mod gptq;
mod integers;
mod modelopt;
mod mxfp4;
mod settings;

use super::directory::{Directory, in_chunks};
use super::quant::blocks;
use super::raw::RawType;
use super::{DType, TensorView, WeightsError};
use floats::Floats;
use half::bf16;
use integers::Integers;
use serde_json::Value;
use settings::Settings;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

/// The quantised matrices of a folder.
#[derive(Debug, Default)]
pub(super) struct Quantised {
    matrices: BTreeMap<String, Matrix>,
    /// Names of the tensors that are part of a matrix.
    parts: BTreeSet<String>,
    /// Name of the format, as `quell inspect` shows it.
    recipe: Option<&'static str>,
}

/// A quantised matrix, or a stack of them.
#[derive(Debug)]
struct Matrix {
    /// Format in which the rows are read.
    dtype: DType,
    form: Form,
}

/// How a matrix is stored.
#[derive(Debug)]
enum Form {
    Integers(Integers),
    Floats(Floats),
}

/// Writes a row of integers, and their scales.
type FillIntegers<'a> = Box<dyn Fn(usize, &mut [i16], &mut [f32]) + Sync + 'a>;

/// Writes a row of numbers.
type FillFloats<'a> = Box<dyn Fn(usize, &mut [f32]) + Sync + 'a>;

/// Rows of a matrix, which are read one by one.
enum Rows<'a> {
    /// Integers with one scale for each `group` inputs of a row.
    Integers {
        fill: FillIntegers<'a>,
        group: usize,
    },
    Floats(FillFloats<'a>),
}

/// Finds the matrices of one format.
type Find = fn(&mut Finder<'_>) -> Result<(), WeightsError>;

/// Formats by the value of `quant_method`, with the names that `quell inspect` shows.
const METHODS: [(&str, &str, Find); 6] = [
    ("awq", "AWQ", awq::find),
    (
        "compressed-tensors",
        "compressed-tensors",
        compressed_tensors::find,
    ),
    ("fp8", "FP8", fp8::find),
    ("gptq", "GPTQ", gptq::find),
    ("modelopt", "ModelOpt", modelopt::find),
    ("mxfp4", "MXFP4", mxfp4::find),
];

impl Quantised {
    /// Finds the quantised matrices of a folder by its `config.json`, which is at `path`. There are
    /// none if it has no `quantization_config`.
    ///
    /// # Errors
    /// Returns [`WeightsError::Unsupported`] for other methods of quantisation, and
    /// [`WeightsError::Malformed`] for settings and tensors that do not fit, with their names.
    pub(super) fn find(
        config: &Value,
        path: &Path,
        directory: &Directory,
    ) -> Result<Self, WeightsError> {
        let Some(settings) = Settings::of(config, path)? else {
            return Ok(Self::default());
        };
        let method = settings.text("quant_method")?.unwrap_or_default();
        let known = METHODS.iter().find(|(name, ..)| *name == method);
        let Some((_, recipe, find)) = known else {
            let names: Vec<_> = METHODS.iter().map(|(name, ..)| *name).collect();
            return Err(WeightsError::Unsupported {
                path: path.to_owned(),
                what: format!("quantization_config.quant_method {method:?}"),
                expected: format!("supported are {}", names.join(", ")),
            });
        };
        let mut finder = Finder {
            settings,
            directory,
            found: Self {
                recipe: Some(recipe),
                ..Self::default()
            },
        };
        find(&mut finder)?;
        finder.claim_other_scales();
        finder.found.unify_experts();
        Ok(finder.found)
    }

    /// Gives the experts of a layer one format, the narrowest that holds all of them.
    fn unify_experts(&mut self) {
        let mut common: BTreeMap<String, DType> = BTreeMap::new();
        for (name, matrix) in &self.matrices {
            if let Some(key) = expert_key(name) {
                let known = common.entry(key).or_insert(matrix.dtype);
                *known = wider(*known, matrix.dtype);
            }
        }
        for (name, matrix) in &mut self.matrices {
            if let Some(dtype) = expert_key(name).and_then(|key| common.get(&key)) {
                matrix.dtype = *dtype;
            }
        }
    }

    /// Returns the name of the format.
    pub(super) fn recipe(&self) -> Option<&'static str> {
        self.recipe
    }

    /// Returns whether a tensor of the files is part of a matrix.
    pub(super) fn claims(&self, name: &str) -> bool {
        self.parts.contains(name)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.matrices.keys().map(String::as_str)
    }

    pub(super) fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, matrix) = self.matrices.get_key_value(name)?;
        Some(TensorView {
            name,
            dtype: matrix.dtype,
            shape: matrix.form.shape(),
            bytes: 0..matrix.rows() * matrix.row_bytes(),
        })
    }

    /// Reads rows of a matrix; `None` if there is no such matrix.
    pub(super) fn read(
        &self,
        directory: &Directory,
        view: &TensorView<'_>,
    ) -> Result<Option<Vec<u8>>, WeightsError> {
        let Some(matrix) = self.matrices.get(view.name) else {
            return Ok(None);
        };
        let row_bytes = matrix.row_bytes();
        let first = view.bytes.start / row_bytes;
        let rows = first..view.bytes.end / row_bytes;
        let columns = matrix.columns();
        let form = match &matrix.form {
            Form::Integers(integers) => integers.open(directory, rows)?,
            Form::Floats(floats) => floats.open(directory, rows)?,
        };
        let mut data = vec![0; view.bytes.len()];
        in_chunks(&mut data, row_bytes, &|start, chunk| {
            let (mut codes, mut weights) = (vec![0; columns], vec![0.0; columns]);
            let mut scales = Vec::new();
            for (index, to) in chunk.chunks_exact_mut(row_bytes).enumerate() {
                let row = start / row_bytes + index;
                match &form {
                    Rows::Floats(fill) => fill(row, &mut weights),
                    Rows::Integers { fill, group } => {
                        scales.resize(columns.div_ceil(*group), 0.0);
                        fill(row, &mut codes, &mut scales);
                        if !matrix.dtype.is_float() {
                            blocks::write(matrix.dtype, &codes, &scales, *group, to);
                            continue;
                        }
                        for (at, (weight, &code)) in weights.iter_mut().zip(&codes).enumerate() {
                            *weight = scales[at / group] * f32::from(code);
                        }
                    }
                }
                if matrix.dtype == DType::BF16 {
                    for (to, weight) in to.chunks_exact_mut(2).zip(&weights) {
                        to.copy_from_slice(&bf16::from_f32(*weight).to_le_bytes());
                    }
                    continue;
                }
                for (to, weight) in to.chunks_exact_mut(4).zip(&weights) {
                    to.copy_from_slice(&weight.to_le_bytes());
                }
            }
            match super::quant::first_not_finite(matrix.dtype, chunk) {
                None => Ok(()),
                Some(index) => Err(WeightsError::NotFinite {
                    path: directory.path_of(matrix.form.numbers()),
                    tensor: view.name.to_owned(),
                    index: (first + start / row_bytes) * columns + index,
                }),
            }
        })?;
        Ok(Some(data))
    }
}

impl Form {
    /// Returns the shape of the matrix, preceded by the number of matrices if it is a stack.
    fn shape(&self) -> &[usize] {
        match self {
            Self::Integers(integers) => &integers.shape,
            Self::Floats(floats) => &floats.shape,
        }
    }

    /// Returns the name of the tensor with the numbers.
    fn numbers(&self) -> &str {
        match self {
            Self::Integers(integers) => &integers.codes,
            Self::Floats(floats) => &floats.numbers,
        }
    }

    /// Returns the names of the tensors that the matrix is stored in.
    fn parts(&self) -> Vec<String> {
        match self {
            Self::Integers(integers) => integers.parts(),
            Self::Floats(floats) => floats.parts(),
        }
    }

    /// Checks the parts, and returns the format in which the rows are read.
    fn dtype(&self, directory: &Directory) -> Result<DType, WeightsError> {
        match self {
            Self::Integers(integers) => integers.dtype(directory),
            Self::Floats(floats) => floats.dtype(directory),
        }
    }
}

impl Matrix {
    fn columns(&self) -> usize {
        self.form.shape().last().copied().unwrap_or(0)
    }

    fn rows(&self) -> usize {
        let shape = self.form.shape();
        shape[..shape.len() - 1].iter().product()
    }

    fn row_bytes(&self) -> usize {
        // Checked when the matrix was found.
        self.dtype.bytes_for(self.columns()).unwrap_or(1).max(1)
    }
}

/// Returns what the names of a matrix of all experts of a layer have in common. Gate and up
/// projections are used together.
fn expert_key(name: &str) -> Option<String> {
    let (layer, rest) = name.split_once(".experts.")?;
    let (_, part) = rest.split_once('.')?;
    Some(format!("{layer}.{}", part.replace("up_proj", "gate_proj")))
}

/// Returns the narrowest format that holds the weights of both.
fn wider(a: DType, b: DType) -> DType {
    const BLOCKS: [DType; 3] = [DType::Q4_0, DType::Q5_0, DType::Q8_0];
    let place = |dtype| BLOCKS.iter().position(|&block| block == dtype);
    match (place(a), place(b)) {
        _ if a == b => a,
        (Some(a), Some(b)) => BLOCKS[a.max(b)],
        _ => DType::F32,
    }
}

/// Endings of the names of scales that activations and cached keys and values would have if they
/// were quantised.
const OTHER_SCALES: [&str; 9] = [
    ".activation_scale",
    ".input_global_scale",
    ".input_scale",
    ".input_zero_point",
    ".k_scale",
    ".output_scale",
    ".prob_output_scale",
    ".q_scale",
    ".v_scale",
];

/// Collects the matrices of a folder.
struct Finder<'a> {
    settings: Settings<'a>,
    directory: &'a Directory,
    found: Quantised,
}

impl Finder<'_> {
    /// Returns the modules whose names, followed by `suffix`, are tensors of this type.
    fn modules(&self, suffix: &str, kind: RawType) -> Vec<String> {
        let raw = self.directory.raw_names();
        raw.filter_map(|name| name.strip_suffix(suffix))
            .filter(|module| {
                let tensor = self.directory.raw(&format!("{module}{suffix}"));
                tensor.is_some_and(|tensor| tensor.kind == kind)
            })
            .map(str::to_owned)
            .collect()
    }

    /// Returns whether the files have a tensor of this name.
    fn has(&self, name: &str) -> bool {
        self.directory.tensor(name).is_some() || self.directory.raw(name).is_some()
    }

    /// Declares that a tensor is part of a matrix, if there is such a tensor.
    fn claim(&mut self, name: String) {
        if self.has(&name) {
            self.found.parts.insert(name);
        }
    }

    /// Claims the scales of what is not quantised here, activations and the KV cache.
    fn claim_other_scales(&mut self) {
        let names = self.directory.names().into_iter();
        let others = names.filter(|name| OTHER_SCALES.iter().any(|end| name.ends_with(end)));
        self.found.parts.extend(others.map(str::to_owned));
    }

    /// Returns the shape of a matrix of raw numbers.
    fn matrix_shape(&self, name: &str) -> Result<[usize; 2], WeightsError> {
        let stored = self.directory.raw(name).map_or(&[][..], |raw| raw.shape);
        let shape = <[usize; 2]>::try_from(stored);
        shape.map_err(|_| wrong(self.directory, name, &format!("{stored:?}"), "a matrix"))
    }

    /// Adds the matrix that the model builder knows as `name`.
    fn add(&mut self, name: String, form: Form) -> Result<(), WeightsError> {
        self.require_size(&name, form.shape())?;
        let dtype = form.dtype(self.directory)?;
        for part in form.parts() {
            self.claim(part);
        }
        let matrix = Matrix { dtype, form };
        if self.directory.tensor(&name).is_some()
            || self.found.matrices.insert(name.clone(), matrix).is_some()
        {
            let problem = format!("{name:?} is stored twice, quantised and not");
            return Err(self.settings.malformed(problem));
        }
        Ok(())
    }

    /// Fails if a matrix is empty, or takes more than can be addressed when it is expanded.
    fn require_size(&self, name: &str, shape: &[usize]) -> Result<(), WeightsError> {
        let mut sizes = shape.iter();
        let bytes = sizes.try_fold(size_of::<f32>(), |all, &one| all.checked_mul(one));
        if bytes.is_some_and(|bytes| bytes > 0 && isize::try_from(bytes).is_ok()) {
            return Ok(());
        }
        let problem = format!("{name:?} has shape {shape:?}, which is empty or too large");
        Err(self.settings.malformed(problem))
    }
}

/// Returns the number of inputs that share a scale; -1 stands for all of them.
fn group_size(finder: &Finder<'_>, key: &str, inputs: usize) -> Result<usize, WeightsError> {
    let settings = finder.settings;
    let Some(value) = settings.get(key) else {
        return Err(settings.refused(key, "missing", "a number of inputs, or -1"));
    };
    let size = match value.as_i64() {
        Some(-1) => Some(inputs),
        Some(size) => usize::try_from(size).ok().filter(|&size| size > 0),
        None => None,
    };
    let size = size.ok_or_else(|| settings.refused(key, value, "a number of inputs, or -1"))?;
    Ok(size.min(inputs).max(1))
}

/// Returns the type and the shape of a tensor, for errors.
fn description(directory: &Directory, name: &str) -> String {
    match (directory.tensor(name), directory.raw(name)) {
        (Some(tensor), _) => format!("{} {:?}", tensor.dtype, tensor.shape),
        (None, Some(tensor)) => format!("{:?} {:?}", tensor.kind, tensor.shape),
        (None, None) => "missing".to_owned(),
    }
}

/// Returns the error for a tensor that is missing or has another type or shape.
fn wrong(directory: &Directory, name: &str, found: &str, expected: &str) -> WeightsError {
    WeightsError::Malformed {
        path: directory.path_of(name),
        format: "safetensors",
        problem: format!("tensor {name:?} is {found}, but must be {expected}"),
    }
}

/// Reads rows of a raw tensor of `row_bytes` bytes each.
fn raw_rows(
    directory: &Directory,
    name: &str,
    row_bytes: usize,
    rows: Range<usize>,
) -> Result<Vec<u8>, WeightsError> {
    directory.read_raw(name, rows.start * row_bytes..rows.end * row_bytes)
}

/// Checks the type and the shape of a raw tensor.
fn require_raw(
    directory: &Directory,
    name: &str,
    kind: RawType,
    shape: &[usize],
) -> Result<(), WeightsError> {
    let found = directory.raw(name);
    if found.is_some_and(|tensor| tensor.kind == kind && tensor.shape == shape) {
        return Ok(());
    }
    let shown = description(directory, name);
    Err(wrong(
        directory,
        name,
        &shown,
        &format!("{kind:?} {shape:?}"),
    ))
}

/// Reads a tensor of plain floating-point numbers, which has one of these shapes.
fn numbers(
    directory: &Directory,
    name: &str,
    shapes: &[&[usize]],
) -> Result<Vec<f32>, WeightsError> {
    let Some(tensor) = directory
        .tensor(name)
        .filter(|tensor| shapes.contains(&tensor.shape))
    else {
        let shown = description(directory, name);
        let shapes: Vec<_> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
        let expected = format!("floating-point numbers {}", shapes.join(" or "));
        return Err(wrong(directory, name, &shown, &expected));
    };
    let mut values = vec![0.0; tensor.elements()];
    super::quant::dequantize(tensor.dtype, &directory.read(&tensor)?, &mut values);
    Ok(values)
}
