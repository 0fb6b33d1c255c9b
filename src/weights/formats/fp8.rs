//! FP8 with a scale per tensor, per output, or per block of outputs and inputs, as DeepSeek, Qwen
//! and transformers publish it.

use super::super::WeightsError;
use super::super::raw::RawType;
use super::floats::{Factor, Floats, Number, Scale};
use super::{Finder, wrong};

pub(super) fn find(finder: &mut Finder<'_>) -> Result<(), WeightsError> {
    let settings = finder.settings;
    if let Some(format) = settings.text("fmt")?
        && !["e4m3", "float8_e4m3", "float8_e4m3fn"].contains(&format)
    {
        return Err(settings.refused("fmt", format!("{format:?}"), "\"e4m3\""));
    }
    let block = match settings.get("weight_block_size") {
        None => None,
        Some(value) => {
            let size = |index: usize| value.get(index)?.as_u64()?.try_into().ok();
            match (size(0), size(1), value.get(2)) {
                (Some(rows), Some(inputs), None) if rows > 0 && inputs > 0 => Some((rows, inputs)),
                _ => {
                    let expected = "two positive numbers";
                    return Err(settings.refused("weight_block_size", value, expected));
                }
            }
        }
    };
    for module in finder.modules(".weight", RawType::F8E4M3) {
        add(finder, &module, block)?;
    }
    Ok(())
}

/// Adds a matrix of FP8 numbers. Without `block`, the shape of the scales says what shares one.
pub(super) fn add(
    finder: &mut Finder<'_>,
    module: &str,
    block: Option<(usize, usize)>,
) -> Result<(), WeightsError> {
    let name = |part: &str| format!("{module}.{part}");
    let weight = name("weight");
    let stored = finder.directory.raw(&weight);
    let stored = stored.map_or_else(Vec::new, |tensor| tensor.shape.to_vec());
    let [outputs, inputs] = stored[..] else {
        let found = format!("{stored:?}");
        return Err(wrong(finder.directory, &weight, &found, "a matrix"));
    };
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
        shape: stored.clone(),
        number: Number::E4m3,
        numbers: weight.clone(),
        stored,
        scale: Scale::Float,
        scales,
        block,
        factor: Factor::One,
    };
    finder.add_floats(weight, floats)
}
