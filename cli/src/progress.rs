//! A progress bar for what takes longer than a second, on a terminal.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use ckpt_core::progress::{Phase, Progress};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Nothing is shown before this.
const PATIENCE: Duration = Duration::from_secs(1);

/// Shows how far a pipeline is, once it has taken a second; always, it writes the log.
pub struct Bar {
    begun: Instant,
    phase: &'static str,
    wanted: bool,
    bar: Option<ProgressBar>,
}

impl Bar {
    pub fn new() -> Bar {
        let wanted = !crate::output::is_quiet() && std::io::stderr().is_terminal();
        Bar { begun: Instant::now(), phase: "", wanted, bar: None }
    }

    fn show(&mut self) -> Option<&ProgressBar> {
        if self.bar.is_none() && self.wanted && self.begun.elapsed() > PATIENCE {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
            bar.set_style(style(false));
            self.bar = Some(bar);
        }
        if let Some(bar) = &self.bar {
            bar.set_message(self.phase);
        }
        self.bar.as_ref()
    }
}

fn style(known: bool) -> ProgressStyle {
    let template = if known {
        "{msg} [{bar:40}] {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left"
    } else {
        "{msg} {binary_bytes}, {binary_bytes_per_sec}"
    };
    ProgressStyle::with_template(template).expect("the templates above are well formed").progress_chars("=> ")
}

impl Progress for Bar {
    fn phase(&mut self, phase: Phase) {
        self.phase = match phase {
            Phase::Freeze => "freezing",
            Phase::Collect => "collecting",
            Phase::WritePages => "writing memory",
            Phase::Publish => "syncing",
            Phase::LetGo => "letting go",
            Phase::Plan => "checking",
            Phase::Skeleton => "making processes",
            Phase::Rebuild => "rebuilding",
            Phase::ReadPages => "reading memory",
        };
        tracing::info!("{}", self.phase);
        if let Some(bar) = self.show() {
            bar.tick();
        }
    }

    fn bytes(&mut self, done: u64, total: Option<u64>) {
        if let Some(bar) = self.show() {
            if bar.length() != total {
                if let Some(total) = total {
                    bar.set_length(total);
                }
                bar.set_style(style(total.is_some()));
            }
            bar.set_position(done);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
