//! The recorder of `/metrics`.

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use std::sync::OnceLock;
use std::time::Duration;
use thiserror::Error;

/// Upper ends of the histograms' buckets, in seconds: from a token's time on a fast GPU
/// to a long answer's on a slow machine.
const SECONDS: [f64; 18] = [
    0.000_1, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0, 120.0,
];

/// The metrics of this process, as `/metrics` answers them.
#[derive(Clone, Debug)]
pub struct Metrics(PrometheusHandle);

/// Why there are no metrics.
#[derive(Debug, Error)]
#[error("metrics cannot be recorded: {0}")]
pub struct MetricsError(String);

impl Metrics {
    /// Installs the recorder for all metrics of this process, once. To be called before
    /// the engine is loaded: an engine keeps the recorder that it finds.
    pub fn install() -> Result<Self, MetricsError> {
        static INSTALLED: OnceLock<Result<Metrics, String>> = OnceLock::new();
        let install = || {
            let matcher = Matcher::Suffix("_seconds".to_owned());
            let builder = PrometheusBuilder::new()
                .set_buckets_for_metric(matcher, &SECONDS)
                .map_err(|error| error.to_string())?;
            let handle = builder
                .install_recorder()
                .map_err(|error| error.to_string())?;
            Ok(Self(handle))
        };
        INSTALLED.get_or_init(install).clone().map_err(MetricsError)
    }

    /// All metrics in Prometheus's text format.
    pub fn render(&self) -> String {
        self.0.render()
    }

    /// Makes the histograms forget what was rendered long ago; to be called every few
    /// seconds, or their memory grows.
    pub(crate) async fn keep(self) {
        let mut every = tokio::time::interval(Duration::from_secs(5));
        loop {
            every.tick().await;
            self.0.run_upkeep();
        }
    }
}
