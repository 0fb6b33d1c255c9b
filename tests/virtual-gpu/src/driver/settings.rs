//! Settings: which GPU this pretends to be, in what order queued work runs, and what is
//! checked. Each has a key. `vgpu_set` changes a setting by key; the environment variable
//! `VGPU_` + the key in capitals sets its initial value.

/// The order in which queued work runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// Immediately when it is queued. The call that queued it reports its fault.
    Eager,
    /// Only what a waiting call needs, and the newest work first, as far as stream order and
    /// events allow.
    Late,
    /// In random order, as far as stream order and events allow. Some work already runs while
    /// more is being queued.
    Shuffle(u64),
}

/// All settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// `name`: result of `cuDeviceGetName`.
    pub name: String,
    /// `compute_capability`, such as `8.0`.
    pub capability: (i32, i32),
    /// `memory`: bytes of device memory; accepts `512M` and `8G`.
    pub memory: usize,
    /// `driver`: result of `cuDriverGetVersion`; 12040 means CUDA 12.4.
    pub driver: i32,
    /// `devices`: number of devices; with 0, `cuInit` fails with `NO_DEVICE`.
    pub devices: i32,
    /// `multiprocessors`: number of multiprocessors.
    pub multiprocessors: i32,
    /// `shared_memory`: maximum bytes of shared memory for a block that opts in; 0 means the
    /// value of the compute capability.
    pub shared_memory: usize,
    /// `memory_pools`: whether the device reports support for `cuMemAllocAsync`.
    pub memory_pools: bool,
    /// `schedule`: `eager`, `late` or `shuffle:SEED`.
    pub schedule: Schedule,
    /// `threads`: number of host threads that run a kernel's blocks.
    pub threads: usize,
    /// `check_races`: detect races on shared memory in kernels.
    pub check_races: bool,
    /// `check_initialised`: reading memory that was never written is a fault in kernels.
    pub check_initialised: bool,
    /// `check_copies`: copying memory that was never written to the host is a violation.
    pub check_copies: bool,
    /// `count`: count what each kernel does (see `vgpu_launches`), for predictions of its speed.
    pub count: bool,
    /// `backtrace`: print a backtrace with each violation.
    pub backtrace: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            name: "quell virtual GPU".to_owned(),
            capability: (8, 0),
            memory: 8 << 30,
            driver: 12040,
            devices: 1,
            multiprocessors: 4,
            shared_memory: 0,
            memory_pools: true,
            schedule: Schedule::Late,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            check_races: true,
            check_initialised: true,
            check_copies: false,
            count: false,
            backtrace: false,
        }
    }
}

/// The keys of all settings.
pub const KEYS: [&str; 15] = [
    "name",
    "compute_capability",
    "memory",
    "driver",
    "devices",
    "multiprocessors",
    "shared_memory",
    "memory_pools",
    "schedule",
    "threads",
    "check_races",
    "check_initialised",
    "check_copies",
    "count",
    "backtrace",
];

impl Settings {
    /// Returns the defaults as changed by the environment. An invalid variable is printed and
    /// aborts the process, because a test must not run with settings other than those it asked
    /// for.
    pub fn from_environment() -> Self {
        let mut settings = Self::default();
        for key in KEYS {
            let variable = format!("VGPU_{}", key.to_uppercase());
            if let Ok(value) = std::env::var(&variable)
                && let Err(why) = settings.set(key, &value)
            {
                eprintln!("virtual GPU: {variable}={value}: {why}");
                std::process::abort();
            }
        }
        settings
    }

    /// Changes one setting.
    ///
    /// # Errors
    /// Returns a description of what is wrong with the key or the value.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "name" => self.name = value.to_owned(),
            "compute_capability" => {
                let (major, minor) = value.split_once('.').ok_or("wants MAJOR.MINOR")?;
                self.capability = (number(major)?, number(minor)?);
            }
            "memory" => self.memory = bytes(value)?,
            "driver" => self.driver = number(value)?,
            "devices" => self.devices = number(value)?,
            "multiprocessors" => self.multiprocessors = number(value)?,
            "shared_memory" => self.shared_memory = bytes(value)?,
            "memory_pools" => self.memory_pools = switch(value)?,
            "schedule" => {
                self.schedule = match value.split_once(':') {
                    None if value == "eager" => Schedule::Eager,
                    None if value == "late" => Schedule::Late,
                    Some(("shuffle", seed)) => Schedule::Shuffle(number(seed)?),
                    _ => return Err("wants eager, late or shuffle:SEED".to_owned()),
                };
            }
            "threads" => match number(value)? {
                0 => return Err("wants at least 1".to_owned()),
                threads => self.threads = threads,
            },
            "check_races" => self.check_races = switch(value)?,
            "check_initialised" => self.check_initialised = switch(value)?,
            "check_copies" => self.check_copies = switch(value)?,
            "count" => self.count = switch(value)?,
            "backtrace" => self.backtrace = switch(value)?,
            _ => {
                return Err(format!(
                    "there is no setting {key:?}; there are {}",
                    KEYS.join(", ")
                ));
            }
        }
        Ok(())
    }

    /// Returns whether a kernel can begin while the one before it still runs.
    pub fn overlaps(&self) -> bool {
        self.capability >= (9, 0)
    }

    /// Returns the maximum bytes of shared memory for a block that opts in.
    pub fn shared_optin(&self) -> usize {
        if self.shared_memory > 0 {
            return self.shared_memory;
        }
        match self.capability {
            (7, 0 | 2) => 96 << 10,
            (7, _) => 64 << 10,
            (8, 0 | 7) => 163 << 10,
            (8, _) | (12, _) => 99 << 10,
            (9.., _) => 227 << 10,
            _ => 48 << 10,
        }
    }

    /// Returns the bytes of shared memory per multiprocessor.
    pub fn shared_per_multiprocessor(&self) -> usize {
        self.shared_optin() + 1024
    }

    /// Returns the maximum number of threads per multiprocessor.
    pub fn threads_per_multiprocessor(&self) -> i32 {
        match self.capability {
            (7, 5) => 1024,
            (8, 6 | 9) | (12, _) => 1536,
            _ => 2048,
        }
    }

    /// Returns the maximum number of blocks per multiprocessor.
    pub fn blocks_per_multiprocessor(&self) -> i32 {
        match self.capability {
            (7, 5) | (8, 6) => 16,
            (8, 9) | (12, _) => 24,
            _ => 32,
        }
    }

    /// Returns the newest PTX version that this driver accepts, for example 84 for 8.4.
    pub fn ptx_version(&self) -> u32 {
        match self.driver {
            ..11040 => 73,
            11040..11050 => 74,
            11050..11060 => 75,
            11060..11070 => 76,
            11070..11080 => 77,
            11080..12000 => 78,
            12000..12010 => 80,
            12010..12020 => 81,
            12020..12030 => 82,
            12030..12040 => 83,
            12040..12050 => 84,
            12050..12060 => 85,
            12060..12070 => 85,
            12070..12080 => 86,
            12080..12090 => 87,
            12090..13000 => 88,
            _ => 90,
        }
    }
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.trim()
        .parse()
        .map_err(|_| format!("{text:?} is not a number that fits"))
}

fn bytes(text: &str) -> Result<usize, String> {
    let text = text.trim();
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    number::<usize>(digits)?
        .checked_mul(1 << shift)
        .ok_or_else(|| "is too large".to_owned())
}

fn switch(text: &str) -> Result<bool, String> {
    match text.trim() {
        "1" | "on" | "true" => Ok(true),
        "0" | "off" | "false" => Ok(false),
        _ => Err("wants 0 or 1".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_by_key() {
        let mut settings = Settings::default();
        settings.set("compute_capability", "7.5").unwrap();
        settings.set("memory", "512M").unwrap();
        settings.set("schedule", "shuffle:7").unwrap();
        assert_eq!(settings.capability, (7, 5));
        assert_eq!(settings.shared_optin(), 65536);
        assert_eq!(settings.memory, 512 << 20);
        assert_eq!(settings.schedule, Schedule::Shuffle(7));
        assert!(settings.set("schedule", "sideways").is_err());
        assert!(
            settings
                .set("colour", "red")
                .unwrap_err()
                .contains("no setting")
        );
        assert!(settings.set("threads", "0").is_err());
    }

    #[test]
    fn every_key_can_be_set() {
        let mut settings = Settings::default();
        for key in KEYS {
            let value = match key {
                "schedule" => "eager",
                "compute_capability" => "9.0",
                _ => "1",
            };
            assert_eq!(settings.set(key, value), Ok(()), "{key}");
        }
    }
}
