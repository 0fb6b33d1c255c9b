//! NVIDIA ModelOpt: FP8 with a scale per tensor, and NVFP4.

use super::super::WeightsError;
use super::super::raw::RawType;
use super::floats::{Factor, Scale};
use super::{Finder, compressed_tensors, fp8};

pub(super) fn find(finder: &mut Finder<'_>) -> Result<(), WeightsError> {
    let settings = finder.settings;
    match settings.text("quant_algo")? {
        Some("FP8") => {
            for module in finder.modules(".weight", RawType::F8E4M3) {
                fp8::add(finder, &module, None)?;
            }
            Ok(())
        }
        Some("NVFP4" | "W4A16_NVFP4") => {
            for module in finder.modules(".weight", RawType::U8) {
                let factor = Factor::Times(format!("{module}.weight_scale_2"));
                let (scale, group) = (Scale::E4m3, 16);
                compressed_tensors::add_fp4(finder, &module, "weight", scale, group, factor)?;
            }
            Ok(())
        }
        other => {
            let found = other.map_or("missing".to_owned(), |other| format!("{other:?}"));
            Err(settings.refused("quant_algo", found, "\"FP8\" or \"NVFP4\""))
        }
    }
}
