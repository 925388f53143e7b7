//! kube-proxy's flags of logging, as far as they say what is logged and how.

use clap::{Args, ValueEnum};

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people and the journal
    Text,
    /// One JSON object a line
    Json,
}

/// How kube-proxy is told what to log.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "As kube-proxy (a flag wins over the config file)")]
pub(crate) struct ProxyLogging {
    /// How much is logged: up to 3 as --log-level info, 4 and 5 as debug, more as trace
    #[arg(long, short, value_name = "N")]
    pub(crate) v: Option<u32>,
    /// How log lines look: text or json
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub(crate) logging_format: Option<LogFormat>,
    /// No effect
    #[arg(long, hide = true, value_name = "DURATION")]
    pub(crate) log_flush_frequency: Option<String>,
    /// No effect
    #[arg(long, hide = true, value_name = "SIZE")]
    pub(crate) log_json_info_buffer_size: Option<String>,
    /// No effect
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub(crate) log_json_split_stream: Option<bool>,
    /// No effect
    #[arg(long, hide = true, value_name = "SIZE")]
    pub(crate) log_text_info_buffer_size: Option<String>,
    /// No effect
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub(crate) log_text_split_stream: Option<bool>,
    /// No effect
    #[arg(long, hide = true, value_name = "PATTERN=N,…")]
    pub(crate) vmodule: Option<String>,
}

impl ProxyLogging {
    /// The filter that the verbosity stands for. Up to 3 kube-proxy tells what an operator wants to
    /// know, up to 5 what it decides, and then what it sends and reads.
    pub(crate) fn filter(&self) -> Option<String> {
        let level = match self.v? {
            0..=3 => return Some("info".to_owned()),
            4 | 5 => "debug",
            _ => "trace",
        };
        Some(format!("info,keelson={level},keelson_api={level},keelson_proxy={level}"))
    }

    /// Flags that were given and do nothing, and what to use instead.
    pub(crate) fn without_effect(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        const AT_ONCE: &str = "lines are written at once, to standard error";
        [
            ("--log-flush-frequency", self.log_flush_frequency.is_some(), AT_ONCE),
            ("--log-json-info-buffer-size", self.log_json_info_buffer_size.is_some(), AT_ONCE),
            ("--log-json-split-stream", self.log_json_split_stream.is_some(), AT_ONCE),
            ("--log-text-info-buffer-size", self.log_text_info_buffer_size.is_some(), AT_ONCE),
            ("--log-text-split-stream", self.log_text_split_stream.is_some(), AT_ONCE),
            ("--vmodule", self.vmodule.is_some(), "--log-level keelson_proxy=debug does the like"),
        ]
        .into_iter()
        .filter(|(_, given, _)| *given)
        .map(|(name, _, why)| (name, why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbosity_is_a_filter() {
        let filter = |v| ProxyLogging { v, ..ProxyLogging::default() }.filter();
        assert_eq!(filter(None), None);
        assert_eq!(filter(Some(2)).as_deref(), Some("info"));
        assert!(filter(Some(4)).unwrap().contains("keelson_proxy=debug"));
        assert!(filter(Some(10)).unwrap().contains("keelson_proxy=trace"));
    }
}
