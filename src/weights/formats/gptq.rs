//! GPTQ: integers of 2, 4 or 8 bits, packed along the inputs, with zero points, and with the group
//! of each input if they were quantised in another order ("act-order"). Frantar et al., *GPTQ*,
//! 2022; the tensors are those of AutoGPTQ and GPTQModel.

use super::super::WeightsError;
use super::super::raw::RawType;
use super::integers::{Integers, Packing, Zeros};
use super::{Finder, Form};

pub(super) fn find(finder: &mut Finder<'_>) -> Result<(), WeightsError> {
    let settings = finder.settings;
    let bits = settings.bits("bits", &[2, 4, 8])?;
    let format = settings.text("checkpoint_format")?.unwrap_or("gptq");
    let are_less_one = match format {
        "gptq" => true,
        "gptq_v2" => false,
        other => {
            let expected = "\"gptq\" or \"gptq_v2\"";
            return Err(settings.refused("checkpoint_format", format!("{other:?}"), expected));
        }
    };
    for module in finder.modules(".qweight", RawType::I32) {
        let name = |part: &str| format!("{module}.{part}");
        let [words, outputs] = finder.matrix_shape(&name("qweight"))?;
        let inputs = words.saturating_mul((32 / bits) as usize);
        let group = super::group_size(finder, "group_size", inputs)?;
        let order = name("g_idx");
        let integers = Integers {
            shape: vec![outputs, inputs],
            bits,
            group,
            codes: name("qweight"),
            packing: Packing::Inputs,
            scales: name("scales"),
            scales_by_group: true,
            zeros: Zeros::Plain {
                name: name("qzeros"),
                are_less_one,
            },
            order: finder.has(&order).then_some(order),
        };
        finder.add(name("weight"), Form::Integers(integers))?;
    }
    Ok(())
}
