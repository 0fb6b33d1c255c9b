//! AWQ: integers of 4 bits, eight outputs per word in an order of their own, with zero points. Lin
//! et al., *AWQ*, 2023; the tensors are those of AutoAWQ's version "gemm".

use super::super::WeightsError;
use super::super::raw::RawType;
use super::integers::{Integers, Packing, Zeros};
use super::{Finder, Form};

pub(super) fn find(finder: &mut Finder<'_>) -> Result<(), WeightsError> {
    let settings = finder.settings;
    let bits = settings.bits("bits", &[4])?;
    let version = settings.text("version")?.unwrap_or("gemm");
    if !version.eq_ignore_ascii_case("gemm") {
        return Err(settings.refused("version", format!("{version:?}"), "\"gemm\""));
    }
    if settings.flag("zero_point")? == Some(false) {
        return Err(settings.refused("zero_point", false, "true"));
    }
    for module in finder.modules(".qweight", RawType::I32) {
        let name = |part: &str| format!("{module}.{part}");
        let [inputs, words] = finder.matrix_shape(&name("qweight"))?;
        let outputs = words.saturating_mul(8);
        let group = super::group_size(finder, "group_size", inputs)?;
        let integers = Integers {
            shape: vec![outputs, inputs],
            bits,
            group,
            codes: name("qweight"),
            packing: Packing::Outputs,
            scales: name("scales"),
            scales_by_group: true,
            zeros: Zeros::Interleaved(name("qzeros")),
            order: None,
        };
        finder.add(name("weight"), Form::Integers(integers))?;
    }
    Ok(())
}
