//! FP8 with a scale per tensor, per output, or per block of outputs and inputs, as DeepSeek, Qwen
//! and transformers publish it.

use super::super::WeightsError;
use super::super::raw::RawType;
use super::floats::{Factor, Floats, Number, Scale};
use super::{Finder, Form};
use serde_json::Value;

pub(super) fn find(finder: &mut Finder<'_>) -> Result<(), WeightsError> {
    let settings = finder.settings;
    if let Some(format) = settings.text("fmt")?
        && !["e4m3", "float8_e4m3", "float8_e4m3fn"].contains(&format)
    {
        return Err(settings.refused("fmt", format!("{format:?}"), "\"e4m3\""));
    }
    let key = "weight_block_size";
    let block = settings.get(key).map(|value| {
        block(value).ok_or_else(|| settings.refused(key, value, "two positive numbers"))
    });
    let block = block.transpose()?;
    for module in finder.modules(".weight", RawType::F8E4M3) {
        add(finder, &module, block)?;
    }
    Ok(())
}

/// Reads the numbers of outputs and of inputs that share a scale, if they are two positive numbers.
pub(super) fn block(value: &Value) -> Option<(usize, usize)> {
    let sizes: &[Value; 2] = value.as_array()?.as_slice().try_into().ok()?;
    let [outputs, inputs] = sizes.each_ref().map(Value::as_u64);
    let size = |size: Option<u64>| usize::try_from(size?).ok().filter(|&size| size > 0);
    size(outputs).zip(size(inputs))
}

/// Adds a matrix of FP8 numbers. Without `block`, the shape of the scales says what shares one.
pub(super) fn add(
    finder: &mut Finder<'_>,
    module: &str,
    block: Option<(usize, usize)>,
) -> Result<(), WeightsError> {
    let name = |part: &str| format!("{module}.{part}");
    let weight = name("weight");
    let [outputs, inputs] = finder.matrix_shape(&weight)?;
    let (scales, of_blocks) = (name("weight_scale"), name("weight_scale_inv"));
    let scales = match finder.has(&of_blocks) || block.is_some() && !finder.has(&scales) {
        true => of_blocks,
        false => scales,
    };
    let count = finder.directory.tensor(&scales);
    let count = count.map_or(1, |tensor| tensor.elements());
    let block = block.unwrap_or(match count == outputs {
        true => (1, inputs.max(1)),
        false => (outputs.max(1), inputs.max(1)),
    });
    let floats = Floats {
        shape: vec![outputs, inputs],
        number: Number::E4m3,
        numbers: weight.clone(),
        stored: vec![outputs, inputs],
        scale: Scale::Float,
        scales,
        block,
        factor: Factor::One,
    };
    finder.add(weight, Form::Floats(floats))
}
