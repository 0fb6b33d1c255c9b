//! Token sampling on the device: launches the kernels of `kernels/sampling.cu`.
//!
//! The parameters of all rows are uploaded in one copy. Token ids, log probabilities and the
//! likeliest tokens come back in one copy on the results stream. The ids also stay on the
//! device, where the next step reads them.

use super::CudaDevice;
use super::context::Context;
use super::error::require;
use super::launch::{Grid, kernels};
use super::memory::Ptr;
use super::scratch::Scratch;
use super::step::NONE;
use super::tensor::CudaTensor;
use super::transfer::{Download, Downloads, Uploads};
use crate::device::{DeviceError, Precision, SamplingOps};
use crate::sampling::{HistoryCounts, SampleRow, Samples, SamplingParams, Token};
use std::rc::Rc;

kernels! {
    /// Kernels of `kernels/sampling.cu`.
    pub(super) struct SamplingKernels in "sampling" {
        sample_sums(sums: Ptr, logits: Ptr, rows: Ptr, columns: u32);
        sample_top(
            result: Ptr, logits: Ptr, sums: Ptr, rows: Ptr, columns: u32, slices: u32,
            top_stride: u32
        );
        sample_edit(
            logits: Ptr, saved: Ptr, entries: Ptr, rows: Ptr, feedback: Ptr, resolved: Ptr,
            sample_rows: Ptr, columns: u32
        );
        sample_best(
            best: Ptr, counts: Ptr, masses: Ptr, filters: Ptr, logits: Ptr, rows: Ptr,
            columns: u32
        );
        sample_histogram(
            counts: Ptr, masses: Ptr, logits: Ptr, best: Ptr, rows: Ptr, columns: u32
        );
        sample_compact(
            lists: Ptr, filters: Ptr, counts: Ptr, masses: Ptr, logits: Ptr, best: Ptr,
            rows: Ptr, columns: u32
        );
        sample_filter(
            winners: Ptr, lists: Ptr, filters: Ptr, counts: Ptr, masses: Ptr, logits: Ptr,
            best: Ptr, rows: Ptr, columns: u32, slices: u32
        );
        sample_draw(
            winners: Ptr, filters: Ptr, logits: Ptr, best: Ptr, rows: Ptr, columns: u32
        );
        sample_finish(
            sampled: Ptr, result: Ptr, logits: Ptr, saved: Ptr, entries: Ptr, best: Ptr,
            winners: Ptr, filters: Ptr, rows: Ptr, columns: u32, slices: u32, top_stride: u32
        );
    }
}

// As in `kernels/sampling.cu`.
const SLICE: usize = 4096;
const BINS: usize = 512;
const LIST: usize = 4096;
/// Maximum vocabulary size. Ranks have 24 bits for a token id, and the 64-bit sum of
/// probability masses has room for 2²⁰ tokens of the largest mass.
const MAX_VOCABULARY: usize = (1 << 20) - 1;

/// Words of parameters per row.
const ROW_WORDS: usize = 18;
/// Index of the parameter word that holds the offset of the row's mask.
const MASK_WORD: usize = 15;
/// Entries of histories and biases per row that memory is reserved for, on average.
const ENTRIES_PER_ROW: usize = 1024;
/// Likeliest tokens per row that memory is reserved for: as many as OpenAI's API reports.
const TOP_PER_ROW: usize = 20;
/// Words of a row's result that precede its likeliest tokens.
const RESULT_WORDS: usize = 4;
/// Bit that is set in the token of a result if the row has logits that are not finite.
const NOT_FINITE: u32 = 1 << 31;

/// State of sampling that is kept from step to step.
pub(super) struct Sampler {
    uploads: Uploads,
    downloads: Downloads,
    row_parameters: RowParameters,
    partials: Scratch,
    saved: Scratch,
    filters: Scratch,
    /// Lists of past steps, kept so that their memory can be reused.
    spare_reports: Vec<Vec<bool>>,
    spare_samples: Samples,
}

impl Sampler {
    pub(super) fn new() -> Self {
        Self {
            uploads: Uploads::outside_graphs("sampling parameters"),
            downloads: Downloads::default(),
            row_parameters: RowParameters::default(),
            partials: Scratch::outside_graphs(),
            saved: Scratch::outside_graphs(),
            filters: Scratch::outside_graphs(),
            spare_reports: Vec::new(),
            spare_samples: Samples::default(),
        }
    }
}

/// Samples on their way to the host.
pub struct CudaPending {
    download: Rc<Download>,
    /// Whether each row requests log probabilities.
    reports: Vec<bool>,
    top_stride: usize,
}

/// Sampling parameters of a step in the layout that the kernels read: the parameters of each
/// row, then the entries of histories and biases, then the masks.
#[derive(Default)]
struct RowParameters {
    words: Vec<u32>,
    entries: Vec<[u32; 2]>,
    /// Masks of the rows that have one, one after the other.
    masks: Vec<u32>,
    counts: HistoryCounts,
    reports: bool,
    top_stride: usize,
    /// Whether any row has penalties, which need its history.
    penalties: bool,
    edits: bool,
    filters: bool,
    draws: bool,
}

impl RowParameters {
    fn fill(&mut self, rows: &[SampleRow], vocabulary: usize) {
        *self = Self {
            words: std::mem::take(&mut self.words),
            entries: std::mem::take(&mut self.entries),
            masks: std::mem::take(&mut self.masks),
            counts: std::mem::take(&mut self.counts),
            ..Self::default()
        };
        self.words.clear();
        self.entries.clear();
        self.masks.clear();
        for row in rows {
            self.add(row, vocabulary);
        }
        // The offset of the masks is known only now.
        let masks = self.words.len() + self.entries.as_flattened().len();
        for row in self.words.chunks_exact_mut(ROW_WORDS) {
            if row[MASK_WORD] != NONE {
                row[MASK_WORD] += masks as u32;
            }
        }
        self.words.extend(self.entries.as_flattened());
        self.words.extend(&self.masks);
    }

    fn add(&mut self, row: &SampleRow, vocabulary: usize) {
        let params = &*row.params;
        let inverse = inverse_temperature(params);
        let floor = if params.min_p > 0.0 {
            params.min_p.ln()
        } else {
            f32::NEG_INFINITY
        };
        let history = self.add_history(row, vocabulary);
        let biases = self.add_biases(params);
        let mask = self.add_mask(row, vocabulary);
        let report = params.logprobs;
        let filtered = params.top_k > 0 || params.top_p < 1.0;
        self.penalties |= params.needs_history();
        self.edits |= params.needs_history() || !params.logit_bias.is_empty();
        self.filters |= inverse > 0.0 && filtered;
        self.draws |= inverse > 0.0 && !filtered;
        self.reports |= report.is_some();
        let top = report.unwrap_or(0).min(SamplingParams::MAX_LOGPROBS);
        self.top_stride = self.top_stride.max((top as usize).min(vocabulary));
        let words: [u32; ROW_WORDS] = [
            params.seed as u32,
            (params.seed >> 32) as u32,
            row.position,
            params.top_k,
            inverse.to_bits(),
            params.top_p.to_bits(),
            floor.to_bits(),
            params.repetition_penalty.to_bits(),
            params.presence_penalty.to_bits(),
            params.frequency_penalty.to_bits(),
            history[0],
            history[1],
            biases[0],
            biases[1],
            report.map_or(NONE, |_| top),
            mask,
            row.forced.unwrap_or(NONE),
            0,
        ];
        self.words.extend(words);
    }

    /// Appends the entries of a row's history, {token, times generated}, and returns their
    /// start and number. One more entry is reserved for a token that only the device knows yet.
    fn add_history(&mut self, row: &SampleRow, vocabulary: usize) -> [u32; 2] {
        if !row.params.needs_history() {
            return [NONE, 0];
        }
        let start = self.entries.len();
        self.counts.count(row, vocabulary, &mut self.entries);
        let count = self.entries.len() - start;
        self.entries.push([NONE, 0]);
        [start as u32, count as u32]
    }

    /// Appends a row's mask and returns its offset among the masks, or [`NONE`] if it has none.
    /// The mask has one bit per token of the vocabulary; tokens beyond a shorter mask are
    /// forbidden.
    fn add_mask(&mut self, row: &SampleRow, vocabulary: usize) -> u32 {
        let Some(mask) = &row.mask else {
            return NONE;
        };
        let (start, words) = (self.masks.len(), vocabulary.div_ceil(32));
        self.masks.extend(mask.iter().take(words));
        self.masks.resize(start + words, 0);
        start as u32
    }

    /// Appends a row's biases, {token, bias}, and returns their start and number. Biases of the
    /// same token are adjacent and keep their order.
    fn add_biases(&mut self, params: &SamplingParams) -> [u32; 2] {
        let start = self.entries.len();
        let biases = params.logit_bias.iter();
        self.entries
            .extend(biases.map(|&(token, bias)| [token, bias.to_bits()]));
        self.entries[start..].sort_by_key(|entry| entry[0]);
        [start as u32, (self.entries.len() - start) as u32]
    }
}

/// Returns 1 / temperature, or 0 for greedy sampling: at temperature 0, or one so low that the
/// inverse overflows.
fn inverse_temperature(params: &SamplingParams) -> f32 {
    let inverse = 1.0 / params.temperature;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// Divides one allocation into consecutive, aligned parts.
struct Parts(usize);

impl Parts {
    /// Returns the offset of the next `bytes` bytes.
    fn take(&mut self, bytes: usize) -> usize {
        let offset = self.0;
        self.0 = (offset + bytes).next_multiple_of(256);
        offset
    }
}

/// Offsets of what the kernels pass on for each row and slice, and the bytes of all of it.
struct PartialParts {
    sums: usize,
    best: usize,
    winners: usize,
    bytes: usize,
}

impl PartialParts {
    fn new(rows: usize, slices: usize) -> Self {
        let mut parts = Parts(0);
        let [sums, best, winners] = [8 * rows * slices; 3].map(|bytes| parts.take(bytes));
        Self {
            sums,
            best,
            winners,
            bytes: parts.0,
        }
    }
}

/// Offsets of what the kernels that filter pass on for each row, and the bytes of all of it.
struct FilterParts {
    counts: usize,
    masses: usize,
    filters: usize,
    lists: usize,
    bytes: usize,
}

impl FilterParts {
    fn new(rows: usize) -> Self {
        let mut parts = Parts(0);
        let counts = parts.take(4 * rows * BINS);
        let masses = parts.take(8 * rows * BINS);
        let filters = parts.take(32 * rows);
        let lists = parts.take(8 * rows * LIST);
        Self {
            counts,
            masses,
            filters,
            lists,
            bytes: parts.0,
        }
    }
}

/// Sizes of the memory to reserve for sampling steps.
pub(super) struct SamplerSizes {
    /// Words of parameters.
    pub(super) parameters: usize,
    /// Bytes of the results of a step.
    pub(super) results: usize,
    /// Bytes of scratch memory: what is passed on, saved logits, and filters.
    pub(super) scratch: [usize; 3],
}

impl SamplerSizes {
    /// Returns the sizes for steps of `rows` sampled rows. Rows with more entries than
    /// [`ENTRIES_PER_ROW`] on average, or more likeliest tokens than [`TOP_PER_ROW`], take more
    /// memory when they occur.
    pub(super) fn new(rows: usize, vocabulary: usize) -> Self {
        let entries = rows * ENTRIES_PER_ROW;
        let slices = vocabulary.div_ceil(SLICE);
        Self {
            parameters: rows * (ROW_WORDS + vocabulary.div_ceil(32)) + 2 * entries,
            results: 4 * rows * (RESULT_WORDS + 2 * TOP_PER_ROW.min(vocabulary)),
            scratch: [
                PartialParts::new(rows, slices).bytes,
                saved_bytes(entries),
                FilterParts::new(rows).bytes,
            ],
        }
    }
}

/// Returns the bytes to save the logits of this many entries. Histories grow in every step;
/// rounding up avoids reallocating in every step.
fn saved_bytes(entries: usize) -> usize {
    4 * entries.next_power_of_two().max(1024)
}

/// Addresses of the kernels' parameters and of the memory in which they pass on results.
struct Addresses {
    rows: Ptr,
    entries: Ptr,
    sums: Ptr,
    best: Ptr,
    winners: Ptr,
    saved: Ptr,
    counts: Ptr,
    masses: Ptr,
    filters: Ptr,
    lists: Ptr,
}

impl Sampler {
    /// Makes room for steps of these sizes.
    pub(super) fn reserve(
        &mut self,
        context: &Context,
        sizes: &SamplerSizes,
    ) -> Result<(), DeviceError> {
        self.uploads.reserve(context, sizes.parameters)?;
        self.downloads.reserve(context, sizes.results)?;
        let [partials, saved, filters] = sizes.scratch;
        self.partials.get(context, partials)?;
        self.saved.get(context, saved)?;
        self.filters.get(context, filters)?;
        Ok(())
    }

    /// Uploads the parameters of `rows` rows, and makes room for the kernels' memory for `room`
    /// rows.
    fn addresses(
        &mut self,
        context: &Context,
        (rows, room): (usize, usize),
        slices: usize,
    ) -> Result<Addresses, DeviceError> {
        let row_parameters = &self.row_parameters;
        let parameters = self.uploads.write(context, &row_parameters.words)?;
        let passed = PartialParts::new(room, slices);
        let base = self.partials.get(context, passed.bytes)?;
        let saved = saved_bytes(row_parameters.entries.len());
        let saved = self.saved.get(context, saved)?;
        let filter = FilterParts::new(room);
        let filter_base = match row_parameters.filters {
            true => self.filters.get(context, filter.bytes)?,
            false => Ptr::NULL,
        };
        Ok(Addresses {
            rows: parameters,
            entries: parameters.offset_bytes(4 * ROW_WORDS * rows),
            sums: base.offset_bytes(passed.sums),
            best: base.offset_bytes(passed.best),
            winners: base.offset_bytes(passed.winners),
            saved,
            counts: filter_base.offset_bytes(filter.counts),
            masses: filter_base.offset_bytes(filter.masses),
            filters: filter_base.offset_bytes(filter.filters),
            lists: filter_base.offset_bytes(filter.lists),
        })
    }
}

impl SamplingOps for CudaDevice {
    type Pending = CudaPending;

    fn sample(
        &mut self,
        logits: &CudaTensor,
        rows: &[SampleRow],
    ) -> Result<CudaPending, DeviceError> {
        const NAME: &str = "sample";
        let columns = logits.columns();
        let fits = logits.rows() >= rows.len()
            && logits.precision() == Precision::Full
            && (1..=MAX_VOCABULARY).contains(&columns);
        require(fits, NAME, || {
            format!(
                "logits are {} × {columns} in {:?} precision, but at least {} rows of 1 to \
                 {MAX_VOCABULARY} columns in Full precision are needed",
                logits.rows(),
                logits.precision(),
                rows.len()
            )
        })?;
        let limit = self.limits.map_or(0, |limits| limits.sequences);
        require(rows.len() <= limit, NAME, || {
            format!("{} rows are more than the {limit} reserved", rows.len())
        })?;
        self.sampler.row_parameters.fill(rows, columns);
        let staged = self.step.samples();
        let row_parameters = &self.sampler.row_parameters;
        let enough = !row_parameters.penalties || staged >= rows.len();
        require(enough, NAME, || {
            let count = rows.len();
            format!("{count} rows are to be sampled, but the step has {staged}")
        })?;
        let top_stride = row_parameters.top_stride;
        let bytes = 4 * rows.len() * (RESULT_WORDS + 2 * top_stride);
        let download = self.sampler.downloads.next(&self.context, bytes)?;
        self.enqueue_sampling(logits, rows.len(), limit, download.ptr())?;
        download.send(&self.context, bytes)?;
        let mut reports = self.sampler.spare_reports.pop().unwrap_or_default();
        reports.clear();
        reports.extend(rows.iter().map(|row| row.params.logprobs.is_some()));
        self.step.set_sampled(rows.len());
        Ok(CudaPending {
            download,
            reports,
            top_stride,
        })
    }

    fn collect(&mut self, pending: CudaPending) -> Result<Samples, DeviceError> {
        let CudaPending {
            download,
            reports,
            top_stride,
        } = pending;
        let mut samples = std::mem::take(&mut self.sampler.spare_samples);
        let Samples { tokens, not_finite } = &mut samples;
        tokens.clear();
        not_finite.clear();
        download.receive(|bytes| {
            let stride = RESULT_WORDS + 2 * top_stride;
            let words = bytes.as_chunks::<4>().0;
            let rows = reports.iter().zip(words.chunks_exact(stride));
            for (row, (&report, words)) in rows.enumerate() {
                let (token, is_finite) = decode(words, report);
                tokens.push(token);
                not_finite.extend((!is_finite).then_some(row));
            }
        })?;
        self.sampler.spare_reports.push(reports);
        Ok(samples)
    }

    fn recycle(&mut self, samples: Samples) {
        let spare = &mut self.sampler.spare_samples;
        if samples.tokens.capacity() > spare.tokens.capacity() {
            *spare = samples;
        }
    }
}

impl CudaDevice {
    /// Launches the kernels that the rows need.
    fn enqueue_sampling(
        &mut self,
        logits: &CudaTensor,
        rows: usize,
        room: usize,
        result: Ptr,
    ) -> Result<(), DeviceError> {
        let slices = logits.columns().div_ceil(SLICE);
        let addresses = self
            .sampler
            .addresses(&self.context, (rows, room), slices)?;
        let Addresses {
            rows: parameters,
            entries,
            sums,
            best,
            winners,
            saved,
            counts,
            masses,
            filters,
            lists,
        } = addresses;
        let by_slice = Grid::new([slices as u32, rows as u32, 1], [256, 1, 1]);
        let by_row = Grid::new([rows as u32, 1, 1], [256, 1, 1]);
        let by_row_to_filter = Grid::new([rows as u32, 1, 1], [512, 1, 1]);
        let by_row_to_rank = Grid::new([rows as u32, 1, 1], [1024, 1, 1]);
        let (columns, slices) = (logits.columns() as u32, slices as u32);
        let row_parameters = &self.sampler.row_parameters;
        let top_stride = row_parameters.top_stride as u32;
        let (kernels, context, step) = (&self.sampling, &self.context, &self.step);
        let logits = logits.ptr();
        if row_parameters.reports {
            kernels.sample_sums(context, by_slice, sums, logits, parameters, columns)?;
            kernels.sample_top(
                context,
                by_row_to_rank,
                result,
                logits,
                sums,
                parameters,
                columns,
                slices,
                top_stride,
            )?;
        }
        if row_parameters.edits {
            let (feedback, resolved) = (step.feedback(), step.resolved());
            let sample_rows = step.sample_rows();
            kernels.sample_edit(
                context,
                by_row,
                logits,
                saved,
                entries,
                parameters,
                feedback,
                resolved,
                sample_rows,
                columns,
            )?;
        }
        kernels.sample_best(
            context, by_slice, best, counts, masses, filters, logits, parameters, columns,
        )?;
        if row_parameters.filters {
            kernels.sample_histogram(
                context, by_slice, counts, masses, logits, best, parameters, columns,
            )?;
            kernels.sample_compact(
                context, by_slice, lists, filters, counts, masses, logits, best, parameters,
                columns,
            )?;
            kernels.sample_filter(
                context,
                by_row_to_filter,
                winners,
                lists,
                filters,
                counts,
                masses,
                logits,
                best,
                parameters,
                columns,
                slices,
            )?;
        }
        // Rows that may keep more tokens than a list holds are drawn from here as well.
        if row_parameters.draws || row_parameters.filters {
            kernels.sample_draw(
                context, by_slice, winners, filters, logits, best, parameters, columns,
            )?;
        }
        kernels.sample_finish(
            context,
            by_row,
            step.sampled(),
            result,
            logits,
            saved,
            entries,
            best,
            winners,
            filters,
            parameters,
            columns,
            slices,
            top_stride,
        )
    }
}

/// Decodes a row's result: the token, and whether the row's logits were finite.
fn decode(words: &[[u8; 4]], report: bool) -> (Token, bool) {
    let (head, top) = words.split_at(RESULT_WORDS);
    let result = u32::from_ne_bytes(head[0]);
    let (id, is_finite) = (result & !NOT_FINITE, result & NOT_FINITE == 0);
    if !report {
        return (Token::new(id), is_finite);
    }
    let count = u32::from_ne_bytes(head[2]) as usize;
    let pairs = top.as_chunks::<2>().0.iter().take(count);
    let pair =
        |&[token, logprob]: &[[u8; 4]; 2]| (u32::from_ne_bytes(token), f32::from_ne_bytes(logprob));
    let token = Token {
        id,
        logprob: f32::from_ne_bytes(head[1]),
        top: pairs.map(pair).collect(),
    };
    (token, is_finite)
}
