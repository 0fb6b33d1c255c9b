//! What must hold for every folder that opens.

use quell::internals::weights::{ModelFolder, WeightSource};
use std::path::Path;

/// Opens a folder if it is valid, and reads all of its tensors, whole and entry by entry.
pub fn check(path: &Path) {
    let Ok(model) = ModelFolder::open(path) else {
        return;
    };
    for name in model.names() {
        let tensor = model.tensor(name).expect("a listed tensor is there");
        assert_eq!(
            tensor.dtype.bytes_for(tensor.elements()),
            Some(tensor.bytes.len())
        );
        if let Ok(data) = model.read(&tensor) {
            assert_eq!(data.len(), tensor.bytes.len());
        }
        for index in 0..tensor.shape.first().map_or(0, |&count| count.min(4)) {
            let part = tensor.slice(index).expect("an entry of the tensor");
            // An entry of a vector may be less than a block.
            if tensor.shape.len() > 1 {
                let _ = model.read(&part);
            }
        }
    }
    let _ = (
        model.count().total,
        model.count().main_format(),
        model.file_bytes(),
        model.recipe(),
    );
}
