//! MXFP4 as gpt-oss stores its experts: numbers of 4 bits with a power of two per 32 inputs.

use super::super::WeightsError;
use super::super::raw::RawType;
use super::floats::{Factor, Floats, Number, Scale};
use super::{Finder, Form, wrong};

/// Inputs that share a scale.
const GROUP: usize = 32;

pub(super) fn find(finder: &mut Finder<'_>) -> Result<(), WeightsError> {
    for module in finder.modules("_blocks", RawType::U8) {
        let numbers = format!("{module}_blocks");
        let stored = finder.directory.raw(&numbers);
        let stored = stored.map_or_else(Vec::new, |tensor| tensor.shape.to_vec());
        let [experts, outputs, groups, 16] = stored[..] else {
            let found = format!("{stored:?}");
            let expected = "[experts, outputs, groups, 16]";
            return Err(wrong(finder.directory, &numbers, &found, expected));
        };
        let inputs = groups.saturating_mul(GROUP);
        let floats = Floats {
            shape: vec![experts, outputs, inputs],
            number: Number::E2m1,
            numbers: numbers.clone(),
            stored,
            scale: Scale::Exponent,
            scales: format!("{module}_scales"),
            block: (1, GROUP),
            factor: Factor::One,
        };
        // Unlike the tensor without this ending, it is not transposed.
        finder.add(numbers, Form::Floats(floats))?;
    }
    Ok(())
}
