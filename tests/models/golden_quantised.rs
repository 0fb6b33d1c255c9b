//! Compares checkpoints in the quantised formats of Hugging Face folders with references that were
//! computed on the weights that they stand for.

use common::golden::{self, Tolerance, cases, quantised};
use quell::internals::model::ModelSource;
use quell::internals::weights::{DType, ModelFolder};
use quell::{Activations, CpuOptions, Engine, LoadOptions};

/// Checks a checkpoint, whose quantised layers are read in this format.
fn check(name: &str, format: DType) {
    let folder = ModelFolder::open(&quantised(name)).unwrap();
    let formats = ModelSource::from_folder(folder)
        .unwrap()
        .parameters()
        .by_format;
    assert!(formats.contains_key(&format), "{name}: {formats:?}");
    let options = LoadOptions {
        cpu: CpuOptions {
            activations: Activations::F32,
            ..CpuOptions::default()
        },
        ..LoadOptions::cpu()
    };
    let engine = Engine::load_with(quantised(name), golden::small_steps(), options).unwrap();
    let tolerance = Tolerance {
        max: 0.02,
        margin: 0.02,
    };
    let vocabulary = engine.info().vocabulary as u32;
    let mut worst = 0.0f32;
    for case in cases(&quantised(name)) {
        let errors = golden::check(&engine, &case, vocabulary, tolerance);
        assert_eq!(errors.len(), 12 * 5);
        worst = errors.into_iter().fold(worst, f32::max);
    }
    println!("{name}: max error {worst}");
}

macro_rules! golden {
    ($($test:ident: $name:literal as $format:ident,)*) => {$(
        #[test]
        fn $test() {
            check($name, DType::$format);
        }
    )*};
}

golden! {
    awq_agrees_with_its_reference: "awq" as Q5_0,
    awq_with_experts_agrees_with_its_reference: "awq-moe" as Q5_0,
    fp8_per_channel_agrees_with_its_reference: "ct-fp8-channel" as F32,
    int8_per_channel_agrees_with_its_reference: "ct-int8-channel" as Q8_0,
    mxfp4_agrees_with_its_reference: "ct-mxfp4" as Q5_0,
    nvfp4_agrees_with_its_reference: "ct-nvfp4" as F32,
    packed_integers_agree_with_their_reference: "ct-w4a16" as Q4_0,
    packed_integers_with_zero_points_agree_with_their_reference: "ct-w4a16-asym" as Q5_0,
    packed_integers_with_experts_agree_with_their_reference: "ct-w4a16-moe" as Q4_0,
    fp8_in_blocks_agrees_with_its_reference: "fp8-block" as F32,
    fp8_in_blocks_with_experts_agrees_with_its_reference: "fp8-block-moe" as F32,
    fp8_per_tensor_agrees_with_its_reference: "fp8-tensor" as F32,
    gpt_oss_in_mxfp4_agrees_with_its_reference: "gpt-oss-mxfp4" as Q5_0,
    gptq_agrees_with_its_reference: "gptq" as Q4_0,
    gptq_with_an_order_agrees_with_its_reference: "gptq-actorder" as F32,
    gptq_with_8_bits_and_zero_points_agrees_with_its_reference: "gptq-asym-8bit" as F32,
}

#[test]
fn every_quantised_checkpoint_of_the_fixtures_has_a_test() {
    let own = include_str!("golden_quantised.rs");
    let mut count = 0;
    for folder in std::fs::read_dir(quantised("")).unwrap() {
        let name = folder.unwrap().file_name().into_string().unwrap();
        assert!(
            own.contains(&format!(": {name:?} as ")),
            "{name} has no test"
        );
        count += 1;
    }
    assert!(count > 0);
}
