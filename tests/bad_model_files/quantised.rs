//! Quantised checkpoints whose settings or tensors do not fit are refused by the name of what is
//! wrong.

use crate::tensors::Folder;
use common::golden::quantised;
use quell::internals::weights::{DType, ModelFolder, WeightSource, quant};
use serde_json::{Value, json};

/// A layer that all checkpoints but that of gpt-oss have.
const LAYER: &str = "model.layers.1.mlp.down_proj";

/// Returns the error for a checkpoint with a change.
fn refused(name: &str, change: impl FnOnce(&mut Folder)) -> String {
    let mut folder = Folder::copy(&quantised(name));
    folder.write();
    ModelFolder::open(folder.path()).unwrap();
    change(&mut folder);
    folder.write();
    match ModelFolder::open(folder.path()) {
        Ok(_) => panic!("{name} was accepted"),
        Err(error) => error.to_string(),
    }
}

/// Checks that a checkpoint with another `quantization_config` is refused with these words.
fn refused_setting(name: &str, key: &str, value: Value, expected: &str) {
    let error = refused(name, |folder| {
        folder.change_config(|config| {
            let settings = &mut config["quantization_config"];
            let (parent, last) = key.rsplit_once('/').unwrap_or(("", key));
            let path = match parent {
                "" => String::new(),
                parent => format!("/{parent}"),
            };
            settings.pointer_mut(&path).unwrap()[last] = value;
        });
    });
    assert!(error.contains(expected), "{name}, {key}: {error}");
}

#[test]
fn settings_are_refused_by_their_names() {
    let weights = "config_groups/group_0/weights";
    let of = |key: &str| format!("{weights}/{key}");
    for (name, key, value, expected) in [
        (
            "gptq",
            "quant_method",
            json!("bitsandbytes"),
            "\"bitsandbytes\" is not supported",
        ),
        (
            "gptq",
            "quant_method",
            json!("exl2"),
            "supported are awq, compressed-tensors",
        ),
        ("gptq", "quant_method", json!(4), "quant_method is 4"),
        (
            "gptq",
            "bits",
            json!(3),
            "quantization_config.bits is 3, but must be one of [2, 4, 8]",
        ),
        (
            "gptq",
            "bits",
            json!(null),
            "quantization_config.bits is missing",
        ),
        (
            "gptq",
            "bits",
            json!(8),
            "model.layers.0.mlp.down_proj.scales",
        ),
        (
            "gptq",
            "group_size",
            json!(0),
            "quantization_config.group_size is 0",
        ),
        (
            "gptq",
            "group_size",
            json!(64),
            "model.layers.0.mlp.down_proj.scales",
        ),
        (
            "gptq",
            "checkpoint_format",
            json!("marlin"),
            "checkpoint_format is \"marlin\"",
        ),
        (
            "awq",
            "version",
            json!("gemv"),
            "quantization_config.version is \"gemv\"",
        ),
        (
            "awq",
            "zero_point",
            json!(false),
            "quantization_config.zero_point is false",
        ),
        ("awq", "bits", json!(8), "quantization_config.bits is 8"),
        (
            "fp8-block",
            "weight_block_size",
            json!([128]),
            "weight_block_size is [128]",
        ),
        (
            "fp8-block",
            "weight_block_size",
            json!([64, 128]),
            "weight_scale_inv",
        ),
        (
            "fp8-block",
            "fmt",
            json!("e5m2"),
            "quantization_config.fmt is \"e5m2\"",
        ),
        (
            "ct-w4a16",
            "format",
            json!("marlin-24"),
            "has the format \"marlin-24\"",
        ),
        ("ct-w4a16", "config_groups", json!({}), "no target for"),
        (
            "ct-w4a16",
            "config_groups",
            json!(3),
            "config_groups is 3, but must be an object",
        ),
        (
            "ct-w4a16",
            "transform_config",
            json!({"config_groups": {"R1": {}}}),
            "quantization_config.transform_config is",
        ),
    ] {
        refused_setting(name, key, value, expected);
    }
    for (name, key, value, expected) in [
        (
            "ct-w4a16",
            of("group_size"),
            json!(100),
            "weights.group_size is 100, but must be a divisor",
        ),
        (
            "ct-w4a16",
            of("symmetric"),
            json!(false),
            "weights.symmetric is false, but must be true",
        ),
        (
            "ct-w4a16-asym",
            of("symmetric"),
            json!(true),
            "weights.symmetric is true, but must be false",
        ),
        (
            "ct-w4a16",
            of("num_bits"),
            json!(5),
            "weights.num_bits is 5",
        ),
        (
            "ct-w4a16",
            of("strategy"),
            json!("block"),
            "weights.strategy is \"block\"",
        ),
        (
            "ct-w4a16",
            "config_groups/group_0/targets".to_owned(),
            json!(["re:("]),
            "config_groups.group_0.targets",
        ),
    ] {
        refused_setting(name, &key, value, expected);
    }
}

#[test]
fn tensors_are_refused_by_their_names() {
    for (name, part, shape) in [
        ("gptq", "scales", json!([256, 4])),
        ("gptq", "qzeros", json!([32, 4])),
        ("gptq", "g_idx", json!([2, 256])),
        ("awq", "scales", json!([256, 4])),
        ("awq", "qzeros", json!([32, 4])),
        ("ct-w4a16", "weight_scale", json!([4, 256])),
        ("ct-w4a16-asym", "weight_zero_point", json!([4, 32])),
        ("ct-fp8-channel", "weight_scale", json!([2, 128])),
        ("ct-int8-channel", "weight_scale", json!([2, 128])),
        ("ct-mxfp4", "weight_scale", json!([16, 256])),
        ("ct-nvfp4", "weight_scale", json!([32, 256])),
        ("ct-nvfp4", "weight_global_scale", json!([1, 1])),
        ("fp8-block", "weight_scale_inv", json!([4, 2])),
    ] {
        let part = format!("{LAYER}.{part}");
        let error = refused(name, |folder| folder.header[&part]["shape"] = shape);
        assert!(error.contains(&part), "{name}: {error}");
        let error = refused(name, |folder| folder.rename(&part));
        assert!(error.contains(&part), "{name}: {error}");
    }
    let part = "model.layers.1.mlp.experts.down_proj_scales";
    let error = refused("gpt-oss-mxfp4", |folder| folder.rename(part));
    assert!(error.contains(part), "{error}");
}

#[test]
fn numbers_are_refused_by_their_places() {
    let order = format!("{LAYER}.g_idx");
    let error = refused("gptq", |folder| folder.bytes(&order)[8..12].fill(0x7f));
    assert!(
        error.contains(&order) && error.contains("input 2"),
        "{error}"
    );
    let scale = format!("{LAYER}.weight_scale");
    let error = refused("ct-mxfp4", |folder| folder.bytes(&scale)[3] = 255);
    assert!(
        error.contains(&scale) && error.contains("NaN at 3"),
        "{error}"
    );
    let weight = format!("{LAYER}.weight_scale_inv");
    let error = refused("fp8-block", |folder| {
        folder.bytes(&weight)[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    assert!(error.contains(&weight), "{error}");
}

#[test]
fn matrices_that_are_empty_or_too_large_are_refused() {
    for (name, part, shape) in [
        ("gptq", "qweight", json!([1u64 << 62, 0])),
        ("awq", "qweight", json!([0, 1u64 << 62])),
        ("ct-w4a16-asym", "weight_packed", json!([1u64 << 61, 0])),
        ("ct-mxfp4", "weight_packed", json!([0, 1u64 << 62])),
        ("fp8-tensor", "weight", json!([0, 1u64 << 62])),
    ] {
        let part = format!("{LAYER}.{part}");
        let error = refused(name, |folder| {
            folder.header.remove(&part).unwrap();
            let kind = match name {
                "ct-mxfp4" => "U8",
                "fp8-tensor" => "F8_E4M3",
                _ => "I32",
            };
            folder.repack();
            let end = folder.data.len();
            let entry = json!({"dtype": kind, "shape": shape, "data_offsets": [end, end]});
            folder.header.insert(part.clone(), entry);
        });
        assert!(
            error.contains("which is empty or too large"),
            "{name}: {error}"
        );
        assert!(error.contains(LAYER), "{name}: {error}");
    }
}

#[test]
fn weights_that_are_not_finite_are_refused_when_they_are_read() {
    let scale = format!("{LAYER}.weight_scale");
    let mut folder = Folder::copy(&quantised("fp8-tensor"));
    // The scale itself is finite, but not its product with the largest number.
    folder.bytes(&scale).copy_from_slice(&3e38f32.to_le_bytes());
    folder.write();
    let model = ModelFolder::open(folder.path()).unwrap();
    let weight = format!("{LAYER}.weight");
    let error = model.read(&model.tensor(&weight).unwrap()).unwrap_err();
    assert!(error.to_string().contains(&weight), "{error}");
    assert!(error.to_string().contains("is not finite"), "{error}");
}

#[test]
fn a_scale_of_zeros_does_not_matter() {
    let mut folder = Folder::copy(&quantised("ct-mxfp4"));
    folder.bytes(&format!("{LAYER}.weight_packed"))[..16].fill(0x80);
    folder.bytes(&format!("{LAYER}.weight_scale"))[0] = 250;
    folder.write();
    let model = ModelFolder::open(folder.path()).unwrap();
    let tensor = model.tensor(&format!("{LAYER}.weight")).unwrap();
    assert_eq!(tensor.dtype, DType::Q5_0);
    let data = model.read(&tensor).unwrap();
    let mut weights = vec![1.0; tensor.elements()];
    quant::dequantize(tensor.dtype, &data, &mut weights);
    assert_eq!(weights[..32], [0.0; 32]);
    assert!(weights.iter().all(|weight| weight.is_finite()));
}

/// Devices multiply all experts of a layer at once.
#[test]
fn the_experts_of_a_layer_have_one_format() {
    let expert = |layer: usize, part: &str| format!("model.layers.{layer}.mlp.experts.2.{part}");
    let mut folder = Folder::copy(&quantised("ct-w4a16-moe"));
    // A bfloat16 number that is no float16 number.
    folder.bytes(&expert(1, "up_proj.weight_scale"))[..2].copy_from_slice(&[0xae, 0x35]);
    folder.write();
    let model = ModelFolder::open(folder.path()).unwrap();
    for name in model.names() {
        let Some((_, part)) = name.split_once(".experts.") else {
            continue;
        };
        let is_changed = name.contains("layers.1.") && !part.contains("down_proj");
        let expected = if is_changed { DType::F32 } else { DType::Q4_0 };
        assert_eq!(model.tensor(name).unwrap().dtype, expected, "{name}");
    }
}

#[test]
fn a_matrix_that_is_stored_twice_is_refused() {
    let error = refused("gptq", |folder| {
        let entry = folder.header.remove("lm_head.weight").unwrap();
        folder.header.insert(format!("{LAYER}.weight"), entry);
    });
    assert!(error.contains("is stored twice"), "{error}");
}
