//! Parses arbitrary bytes as a GGUF file: opening it succeeds or returns an error, and what
//! opens can be read.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use quell::internals::weights::quant::dequantize;
use quell::internals::weights::{Gguf, WeightSource};
use std::path::Path;

/// Number of weights to dequantise per tensor.
const WEIGHTS: usize = 1024;

fuzz_target!(|bytes: &[u8]| -> Corpus {
    let Ok(file) = Gguf::from_bytes(bytes.to_vec(), Path::new("fuzz.gguf")) else {
        return Corpus::Keep;
    };
    for key in file.metadata_keys() {
        let value = file.metadata(key).expect("a listed key is there");
        let _ = (
            value.as_u64s(),
            value.as_f64(),
            value.as_strings(),
            value.type_name(),
        );
    }
    for name in file.names() {
        let tensor = file.tensor(name).expect("a listed tensor is there");
        assert_eq!(
            tensor.dtype.bytes_for(tensor.elements()),
            Some(tensor.bytes.len())
        );
        let weights = tensor.elements().min(WEIGHTS);
        let bytes = tensor.dtype.bytes_for(weights).expect("whole blocks");
        let mut row = vec![0.0; weights];
        if let Ok(data) = file.read(&tensor) {
            dequantize(tensor.dtype, &data[..bytes], &mut row);
        }
        for index in 0..tensor.shape[0].min(4) {
            assert!(tensor.slice(index).is_some());
        }
    }
    let _ = (file.count().main_format(), file.file_type());
    Corpus::Keep
});
