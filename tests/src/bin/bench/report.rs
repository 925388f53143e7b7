//! What was measured, as a table for people and as JSON for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::statistics::Samples;

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Thousandths of a second.
    Milliseconds,
    /// Millions of bytes.
    Megabytes,
    /// Hundredths of one processor.
    Percent,
    /// Things in a second; more is better, so there are no aims.
    PerSecond,
    /// Things.
    Count,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Milliseconds => "ms",
            Self::Megabytes => "MB",
            Self::Percent => "%",
            Self::PerSecond => "/s",
            Self::Count => "",
        }
    }

    fn show(self, value: f64) -> String {
        match self {
            Self::Count => format!("{value:.0}"),
            _ if value.abs() >= 100.0 => format!("{value:.0} {}", self.name()),
            _ if value.abs() >= 10.0 => format!("{value:.1} {}", self.name()),
            _ => format!("{value:.2} {}", self.name()),
        }
    }

    fn show_all(self, samples: &Samples) -> String {
        let median = self.show(samples.median());
        let bare = |share| {
            let text = self.show(samples.quantile(share));
            text.split(' ').next().unwrap_or_default().to_owned()
        };
        match samples.count() {
            0 | 1 => median,
            n if n < 50 => format!("{median} [{}–{}] n={n}", bare(0.0), bare(1.0)),
            n => format!("{median} [{}–{}, p99 {}] n={n}", bare(0.0), bare(1.0), bare(0.99)),
        }
    }
}

/// One line of the table.
#[derive(Clone, Debug)]
pub(crate) struct Figure {
    what: String,
    unit: Unit,
    measured: Samples,
    beside: Option<(String, Samples)>,
    aim: Option<f64>,
}

impl Figure {
    /// Something measured.
    pub(crate) fn new(what: impl Into<String>, unit: Unit, measured: Samples) -> Self {
        Self { what: what.into(), unit, measured, beside: None, aim: None }
    }

    /// What was measured beside it in the same run.
    pub(crate) fn beside(mut self, what: impl Into<String>, measured: Samples) -> Self {
        self.beside = Some((what.into(), measured));
        self
    }

    /// What it should be below.
    pub(crate) fn aim(mut self, below: f64) -> Self {
        self.aim = Some(below);
        self
    }

    fn ratio(&self) -> Option<f64> {
        let beside = self.beside.as_ref()?.1.median();
        (beside > 0.0).then(|| self.measured.median() / beside)
    }

    fn is_met(&self) -> Option<bool> {
        self.aim.map(|aim| self.measured.median() < aim)
    }

    fn cells(&self) -> [String; 6] {
        let beside = self.beside.as_ref().map_or_else(String::new, |(what, samples)| {
            format!("{what}: {}", self.unit.show_all(samples))
        });
        [
            self.what.clone(),
            self.unit.show_all(&self.measured),
            beside,
            self.ratio().map_or_else(String::new, |ratio| format!("{ratio:.2}")),
            self.aim.map_or_else(String::new, |aim| format!("< {}", self.unit.show(aim))),
            match self.is_met() {
                Some(true) => "yes".to_owned(),
                Some(false) => "NO".to_owned(),
                None => String::new(),
            },
        ]
    }

    /// For programs.
    pub(crate) fn to_json(&self) -> Value {
        json!({
            "figure": self.what,
            "unit": self.unit.name(),
            "measured": self.measured.to_json(),
            "beside": self.beside.as_ref().map(|(what, samples)| {
                json!({"what": what, "measured": samples.to_json()})
            }),
            "ratio": self.ratio(),
            "aim": self.aim,
            "met": self.is_met(),
        })
    }
}

/// Figures that one command makes.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    /// What they are about, and what the comparison is.
    pub(crate) title: String,
    /// The command that makes these figures alone.
    pub(crate) command: String,
    /// The figures.
    pub(crate) figures: Vec<Figure>,
}

/// The table.
pub(crate) fn table(sections: &[Section]) -> String {
    let heads = ["figure", "measured: median [min–max]", "beside it", "ratio", "aim", "met"];
    let mut widths = heads.map(|head| head.chars().count());
    for cells in sections.iter().flat_map(|s| &s.figures).map(Figure::cells) {
        for (width, cell) in widths.iter_mut().zip(&cells) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &[String; 6]| {
        let mut line = String::from(" ");
        for (cell, width) in cells.iter().zip(widths) {
            let _ = write!(line, " {cell:width$} ");
        }
        format!("{}\n", line.trim_end())
    };
    let mut text = line(&heads.map(str::to_owned));
    for section in sections {
        let _ = write!(text, "\n{}\n    made by: {}\n", section.title, section.command);
        for figure in &section.figures {
            text.push_str(&line(&figure.cells()));
        }
    }
    text
}

/// The same for programs.
pub(crate) fn to_json(about: &Value, sections: &[Section]) -> Value {
    let sections: Vec<Value> = sections
        .iter()
        .map(|section| {
            let figures: Vec<Value> = section.figures.iter().map(Figure::to_json).collect();
            json!({"title": section.title, "command": section.command, "figures": figures})
        })
        .collect();
    json!({"about": about, "sections": sections})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_whether_the_aim_is_met() {
        let figure =
            Figure::new("start", Unit::Milliseconds, [30.0, 10.0, 20.0].into_iter().collect())
                .beside("runc", Samples::one(40.0))
                .aim(80.0);
        let cells = figure.cells();
        assert_eq!(cells[1], "20.0 ms [10.0–30.0] n=3");
        assert_eq!(cells[2..], ["runc: 40.0 ms", "0.50", "< 80.0 ms", "yes"]);
        let missed = Figure::new("rest", Unit::Megabytes, Samples::one(51.0)).aim(50.0);
        assert_eq!(missed.cells()[5], "NO");
        assert_eq!(missed.to_json()["met"], false);
        let section = Section { title: "t".into(), command: "c".into(), figures: vec![figure] };
        assert!(table(&[section]).contains("made by: c"));
    }
}
