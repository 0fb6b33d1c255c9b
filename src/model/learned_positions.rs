//! The input of encoders of the BERT family: to the embedding of a token are added learned
//! embeddings of its position and of its segment, and the sum is normalised.

use super::tensors::Naming;
use super::{ModelError, ModelSource};

/// The learned embeddings of positions and segments of a model. Devlin et al., *BERT*, 2018.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LearnedPositions {
    /// Number of segments that tell texts apart, such as a question and an answer (token types).
    pub segments: usize,
    /// Number of stored embeddings before that of the first position, which no token has.
    pub unused: usize,
}

/// Tensors of the input besides the embeddings of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PositionPart {
    Positions,
    Segments,
    NormWeight,
    NormBias,
}

impl PositionPart {
    pub(super) const ALL: [Self; 4] = [
        Self::Positions,
        Self::Segments,
        Self::NormWeight,
        Self::NormBias,
    ];

    /// Returns the name of the tensor in Hugging Face checkpoints, after the prefix.
    pub(super) fn huggingface(self) -> &'static str {
        match self {
            Self::Positions => "embeddings.position_embeddings.weight",
            Self::Segments => "embeddings.token_type_embeddings.weight",
            Self::NormWeight => "embeddings.LayerNorm.weight",
            Self::NormBias => "embeddings.LayerNorm.bias",
        }
    }

    fn gguf(self) -> &'static str {
        match self {
            Self::Positions => "position_embd.weight",
            Self::Segments => "token_types.weight",
            Self::NormWeight => "token_embd_norm.weight",
            Self::NormBias => "token_embd_norm.bias",
        }
    }
}

impl ModelSource {
    /// Returns the name of a tensor of the input.
    pub(super) fn position_name(&self, part: PositionPart) -> String {
        match self.naming() {
            Naming::Gguf => part.gguf().to_owned(),
            Naming::HuggingFace { prefix } => format!("{prefix}{}", part.huggingface()),
        }
    }

    /// Reads what is added to token embeddings, `[segments, context, hidden]`.
    pub(super) fn position_sums(&self, own: LearnedPositions) -> Result<Vec<f32>, ModelError> {
        let (context, hidden) = (self.config().context, self.config().hidden);
        let name = self.position_name(PositionPart::Positions);
        let positions = self.table(&name, own.unused + context, hidden)?;
        let positions = &positions[own.unused * hidden..];
        let name = self.position_name(PositionPart::Segments);
        let segments = self.table(&name, own.segments, hidden)?;
        let mut sums = Vec::with_capacity(segments.len() * context);
        for segment in segments.chunks_exact(hidden) {
            for position in positions.chunks_exact(hidden) {
                sums.extend(position.iter().zip(segment).map(|(a, b)| a + b));
            }
        }
        Ok(sums)
    }

    /// Reads the weight and the bias of the norm of the input.
    pub(super) fn position_norm(&self) -> Result<[Vec<f32>; 2], ModelError> {
        let hidden = self.config().hidden;
        let read = |part| self.vector(&self.position_name(part), hidden);
        Ok([
            read(PositionPart::NormWeight)?,
            read(PositionPart::NormBias)?,
        ])
    }

    /// Reads the first `rows` rows of a matrix of floating-point numbers, which may have more.
    fn table(&self, name: &str, rows: usize, columns: usize) -> Result<Vec<f32>, ModelError> {
        let tensor = self.tensor(name)?;
        match *tensor.shape {
            [found, width] if found >= rows && width == columns => {
                let mut all = self.floats(name, &[found, columns])?;
                all.truncate(rows * columns);
                Ok(all)
            }
            _ => Err(ModelError::WrongShape {
                name: name.to_owned(),
                found: tensor.shape.to_vec(),
                expected: vec![rows, columns],
            }),
        }
    }
}
