//! `GET /metrics`: the metrics for Prometheus, and the recorder behind them.

use crate::server::App;
use crate::server::error::ApiError;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use thiserror::Error;

/// Upper bounds of the histogram buckets, in seconds: from the time per token on a fast GPU to
/// the time of a long answer on a slow machine.
const SECONDS: [f64; 18] = [
    0.000_1, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0, 120.0,
];

/// The metrics of this process, which `/metrics` returns.
#[derive(Clone, Debug)]
pub struct Metrics(PrometheusHandle);

/// An error that keeps metrics from being recorded.
#[derive(Debug, Error)]
#[error("metrics cannot be recorded: {0}")]
pub struct MetricsError(String);

impl Metrics {
    /// Installs the recorder for all metrics of this process. Further calls return the same
    /// recorder. Call this before loading an engine, because an engine keeps the recorder that
    /// it finds then.
    ///
    /// # Errors
    /// Returns [`MetricsError`] if the process already has another recorder.
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

    /// Returns all metrics in Prometheus's text format.
    pub fn render(&self) -> String {
        self.0.render()
    }

    /// Moves recorded samples into the histograms' buckets every few seconds. Without this, the
    /// samples would pile up in memory between two scrapes.
    pub(crate) async fn keep(self) {
        let mut every = tokio::time::interval(Duration::from_secs(5));
        loop {
            every.tick().await;
            self.0.run_upkeep();
        }
    }
}

/// Returns the metrics for Prometheus.
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let Some(metrics) = &app.options.metrics else {
        return Err(ApiError::not_found(
            "this server was started without metrics",
        ));
    };
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], metrics.render()).into_response())
}
