//! The least time that a launch takes on a GPU, by what was counted and the GPU's published
//! rates.
//!
//! Each of four resources bounds the time: device memory, the banks of shared memory, the issue
//! of instructions, and the tensor cores. The multiprocessors share the blocks as evenly as
//! whole blocks allow, so the last three are those of the busiest one. What waits for latencies,
//! or for another resource, makes a launch slower than its tightest bound.

/// A GPU's published rates, and its limits per multiprocessor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpu {
    pub name: &'static str,
    /// Name of its architecture for ptxas.
    pub architecture: &'static str,
    pub multiprocessors: u64,
    /// Boost clock in Hz.
    pub clock: f64,
    /// Bytes of device memory per second, read and written.
    pub memory: f64,
    /// Floating-point operations per clock and multiprocessor of `mma.sync` with 16-bit factors
    /// and float32 sums.
    pub tensor: f64,
    /// Threads per multiprocessor.
    pub threads: u64,
    /// Blocks per multiprocessor.
    pub blocks: u64,
    /// Bytes of shared memory per multiprocessor.
    pub shared: u64,
}

/// Wavefronts (128 bytes) of shared memory per clock and multiprocessor.
const WAVEFRONTS_PER_CLOCK: f64 = 1.0;
/// Instructions of warps that a multiprocessor issues per clock: one per scheduler.
const INSTRUCTIONS_PER_CLOCK: f64 = 4.0;
/// Registers per scheduler; each multiprocessor has four.
const REGISTERS: u64 = 16384;
const SCHEDULERS: u64 = 4;
/// Registers are allocated to warps in units of this many.
const REGISTER_UNIT: u64 = 256;
/// Shared memory is allocated to blocks in units of this many bytes, and this many are reserved.
const SHARED_UNIT: u64 = 128;
const SHARED_RESERVED: u64 = 1024;

/// The GPUs for which bounds are computed.
///
/// Rates: the data sheets of H100 and H200 (SXM) say 989.4 TFLOP/s in dense bfloat16 for 132
/// multiprocessors, which is 4,096 operations per clock at 1.83 GHz; `mma.sync` reaches 63 % of
/// that, since only `wgmma` reaches all (Luo et al., "Dissecting the NVIDIA Hopper Architecture
/// through Microbenchmarking and Multiple Level Analysis", arXiv 2501.12084). A100 80 GB: data
/// sheet and "NVIDIA A100 Tensor Core GPU Architecture", 312 TFLOP/s with 108 multiprocessors at
/// 1.41 GHz. RTX 4090: "NVIDIA Ada GPU Architecture", appendix A, 165.2 TFLOP/s (float16 with
/// float32 sums) with 128 multiprocessors at 2.52 GHz. Limits: "CUDA C++ Programming Guide",
/// technical specifications per compute capability. 128 bytes of shared memory per clock, four
/// instructions per clock and the units of allocation: the tuning guides of the architectures,
/// and NVIDIA's occupancy calculator.
pub const GPUS: [Gpu; 4] = [
    Gpu {
        name: "H200",
        architecture: "sm_90",
        multiprocessors: 132,
        clock: 1.83e9,
        memory: 4.8e12,
        tensor: 0.63 * 4096.0,
        threads: 2048,
        blocks: 32,
        shared: 228 << 10,
    },
    Gpu {
        name: "H100",
        architecture: "sm_90",
        multiprocessors: 132,
        clock: 1.83e9,
        memory: 3.35e12,
        tensor: 0.63 * 4096.0,
        threads: 2048,
        blocks: 32,
        shared: 228 << 10,
    },
    Gpu {
        name: "A100",
        architecture: "sm_80",
        multiprocessors: 108,
        clock: 1.41e9,
        memory: 2.039e12,
        tensor: 2048.0,
        threads: 2048,
        blocks: 32,
        shared: 164 << 10,
    },
    Gpu {
        name: "RTX 4090",
        architecture: "sm_89",
        multiprocessors: 128,
        clock: 2.52e9,
        memory: 1.008e12,
        tensor: 512.0,
        threads: 1536,
        blocks: 24,
        shared: 100 << 10,
    },
];

/// What a block needs of a multiprocessor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Block {
    pub threads: u64,
    /// Registers per thread.
    pub registers: u64,
    /// Bytes of shared memory.
    pub shared: u64,
}

/// What a launch does in total.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    pub blocks: u64,
    /// Bytes read from and written to device memory.
    pub bytes: u64,
    /// Wavefronts of shared memory.
    pub wavefronts: u64,
    /// Machine instructions of warps.
    pub instructions: u64,
    /// Floating-point operations of the tensor cores.
    pub multiplications: u64,
}

/// The seconds that each resource needs at least.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bounds {
    pub memory: f64,
    pub shared: f64,
    pub issue: f64,
    pub tensor: f64,
}

impl Bounds {
    /// Returns all bounds with their names.
    pub fn all(&self) -> [(&'static str, f64); 4] {
        [
            ("memory", self.memory),
            ("shared", self.shared),
            ("issue", self.issue),
            ("tensor", self.tensor),
        ]
    }

    /// Returns the name and the seconds of the resource that needs the most time.
    pub fn tightest(&self) -> (&'static str, f64) {
        let [first, rest @ ..] = self.all();
        let longer = |a: (&'static str, f64), b: (&'static str, f64)| if b.1 > a.1 { b } else { a };
        rest.into_iter().fold(first, longer)
    }
}

impl Gpu {
    /// Returns the number of blocks that a multiprocessor runs at once.
    pub fn resident(&self, block: Block) -> u64 {
        let warps = block.threads.div_ceil(32).max(1);
        let per_warp = (block.registers.max(1) * 32).next_multiple_of(REGISTER_UNIT);
        let by_registers = REGISTERS / per_warp * SCHEDULERS / warps.next_multiple_of(SCHEDULERS);
        let shared = block.shared.next_multiple_of(SHARED_UNIT) + SHARED_RESERVED;
        let limits = [
            self.blocks,
            self.threads / (warps * 32),
            by_registers,
            self.shared / shared,
        ];
        limits.into_iter().min().unwrap_or(0)
    }

    /// Returns the share of the warps that a multiprocessor could run at once which it does run,
    /// if there are enough blocks.
    pub fn occupancy(&self, block: Block) -> f64 {
        let warps = self.resident(block) * block.threads.div_ceil(32);
        warps as f64 * 32.0 / self.threads as f64
    }

    /// Returns the least time of a launch whose blocks all do the same work.
    pub fn bounds(&self, work: Work) -> Bounds {
        let blocks = work.blocks.max(1);
        // The part of the work that the busiest multiprocessor does.
        let busiest = blocks.div_ceil(self.multiprocessors) as f64 / blocks as f64;
        let clocks = |amount: u64, per_clock: f64| amount as f64 * busiest / per_clock / self.clock;
        Bounds {
            memory: work.bytes as f64 / self.memory,
            shared: clocks(work.wavefronts, WAVEFRONTS_PER_CLOCK),
            issue: clocks(work.instructions, INSTRUCTIONS_PER_CLOCK),
            tensor: clocks(work.multiplications, self.tensor),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Gpu = GPUS[0];
    const RTX_4090: Gpu = GPUS[3];

    fn block(threads: u64, registers: u64, shared: u64) -> Block {
        Block {
            threads,
            registers,
            shared,
        }
    }

    #[test]
    fn registers_shared_memory_threads_and_blocks_limit_the_occupancy() {
        for (block, resident) in [
            (block(128, 166, 69_632), 3), // by registers and by shared memory
            (block(128, 255, 34_816), 2), // by registers
            (block(128, 64, 66_048), 3),  // by shared memory
            (block(128, 168, 99_328), 2), // by shared memory
            (block(1024, 32, 0), 2),      // by threads
            (block(32, 16, 0), 32),       // by blocks
            (block(96, 40, 0), 12),       // warps are spread over four schedulers
            (block(128, 40, 300_000), 0), // does not fit
        ] {
            assert_eq!(H200.resident(block), resident, "{block:?}");
        }
        assert_eq!(H200.occupancy(block(128, 64, 66_048)), 12.0 / 64.0);
        assert_eq!(RTX_4090.resident(block(128, 64, 66_048)), 1);
        assert_eq!(RTX_4090.resident(block(1024, 32, 0)), 1);
    }

    #[test]
    fn each_resource_bounds_the_time() {
        let work = Work {
            blocks: 132,
            bytes: 4_800_000_000,
            wavefronts: 132 * 1_830_000,
            instructions: 132 * 4 * 3_660_000,
            multiplications: 0,
        };
        let bounds = H200.bounds(work);
        let near = |a: f64, b: f64| (a - b).abs() < 1e-12;
        assert!(near(bounds.memory, 1e-3), "{bounds:?}");
        assert!(near(bounds.shared, 1e-3), "{bounds:?}");
        assert!(near(bounds.issue, 2e-3), "{bounds:?}");
        assert_eq!((bounds.tensor, bounds.tightest().0), (0.0, "issue"));
    }

    #[test]
    fn blocks_that_do_not_divide_evenly_leave_multiprocessors_idle() {
        let work = |blocks| Work {
            blocks,
            wavefronts: 1_000_000 * blocks,
            ..Work::default()
        };
        // Half as many blocks as multiprocessors take as long as one each, and one more twice.
        let seconds = |blocks| H200.bounds(work(blocks)).shared;
        let near = |a: f64, b: f64| (a - b).abs() < 1e-12;
        assert!(near(seconds(66), seconds(132)));
        assert!(near(seconds(133), 2.0 * seconds(132)));
    }

    #[test]
    fn published_tensor_rates_follow_from_clocks_and_multiprocessors() {
        let published = [989.4 * 0.63, 989.4 * 0.63, 312.0, 165.2];
        for (gpu, published) in GPUS.iter().zip(published) {
            let rate = gpu.tensor * gpu.clock * gpu.multiprocessors as f64 / 1e12;
            assert!(
                (rate / published - 1.0).abs() < 0.001,
                "{}: {rate}",
                gpu.name
            );
        }
    }
}
