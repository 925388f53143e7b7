//! Amounts as Kubernetes writes them: `100m`, `1.5`, `64Mi`, `2e3`.
//!
//! The format is that of `k8s.io/apimachinery/pkg/api/resource`: a signed decimal number with a
//! decimal suffix (`n u m k M G T P E`), a binary one (`Ki Mi Gi Ti Pi Ei`) or a decimal exponent.
//! Amounts are held exactly, in billionths; smaller fractions are rounded up, as documented.

use std::{cmp::Ordering, fmt, iter::Sum, ops, str::FromStr};

use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;

const NANOS: i128 = 1_000_000_000;
/// 2^63 - 1 units: no amount is larger (larger ones are capped, as documented).
const MAX_NANOS: i128 = (i64::MAX as i128) * NANOS;

/// Which family of suffixes an amount was written with, and is printed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `1Ki`: powers of 1024.
    Binary,
    /// `1k`: powers of 1000.
    Decimal,
    /// `1e3`.
    Exponent,
}

/// An amount of something.
#[derive(Clone, Copy, Debug)]
pub struct Quantity {
    nanos: i128,
    format: Format,
}

/// The text is not a quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a quantity: a number with an optional suffix such as m, k, Mi or Gi is needed"
)]
pub struct ParseQuantityError {
    text: String,
}

impl Quantity {
    /// Nothing.
    pub const ZERO: Self = Self { nanos: 0, format: Format::Decimal };

    /// Reads an amount.
    ///
    /// # Errors
    /// When the text is not in the documented form.
    pub fn parse(text: &str) -> Result<Self, ParseQuantityError> {
        parse(text).ok_or_else(|| ParseQuantityError { text: text.chars().take(64).collect() })
    }

    /// Whole units, printed with decimal suffixes.
    pub fn from_units(units: i64) -> Self {
        Self { nanos: i128::from(units) * NANOS, format: Format::Decimal }
    }

    /// Bytes, printed with binary suffixes.
    pub fn from_bytes(bytes: i64) -> Self {
        Self { nanos: i128::from(bytes) * NANOS, format: Format::Binary }
    }

    /// Thousandths of a unit, printed with decimal suffixes.
    pub fn from_milli(milli: i64) -> Self {
        Self { nanos: i128::from(milli) * (NANOS / 1000), format: Format::Decimal }
    }

    /// Whole units (bytes of memory, cores), rounded up.
    pub fn value(&self) -> i64 {
        to_i64(div_ceil(self.nanos, NANOS))
    }

    /// Thousandths of a unit (millicores), rounded up.
    pub fn milli(&self) -> i64 {
        to_i64(div_ceil(self.nanos, NANOS / 1000))
    }

    /// Whether it is nothing.
    pub fn is_zero(&self) -> bool {
        self.nanos == 0
    }

    /// Whether it is less than nothing.
    pub fn is_negative(&self) -> bool {
        self.nanos < 0
    }

    /// This amount divided by another, rounded up: what `resourceFieldRef` with a `divisor` gives.
    /// A divisor of zero counts as one.
    pub fn divided_by(&self, divisor: &Self) -> i64 {
        let divisor = if divisor.nanos == 0 { NANOS } else { divisor.nanos };
        to_i64(div_ceil(self.nanos, divisor))
    }
}

fn to_i64(value: i128) -> i64 {
    i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX })
}

fn div_ceil(a: i128, b: i128) -> i128 {
    let quotient = a / b;
    if a % b != 0 && (a < 0) == (b < 0) { quotient + 1 } else { quotient }
}

fn parse(text: &str) -> Option<Quantity> {
    let (negative, rest) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    let (number, suffix) = rest.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') || number.len() > 128 {
        return None;
    }
    let (format, multiplier, exponent) = suffix_of(suffix)?;
    let nanos = scaled(whole, fraction, multiplier, exponent)?;
    Some(Quantity { nanos: if negative { -nanos } else { nanos }, format })
}

/// The family of a suffix, and what it multiplies by: `multiplier × 10^exponent`.
fn suffix_of(suffix: &str) -> Option<(Format, i128, i32)> {
    let decimal = |exponent| Some((Format::Decimal, 1, exponent));
    let binary = |power: u32| Some((Format::Binary, 1_i128 << (10 * power), 0));
    match suffix {
        "n" => decimal(-9),
        "u" => decimal(-6),
        "m" => decimal(-3),
        "" => decimal(0),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        _ => {
            let digits = suffix.strip_prefix(['e', 'E'])?;
            let exponent: i32 = digits.parse().ok().filter(|e: &i32| e.abs() <= 1000)?;
            Some((Format::Exponent, 1, exponent))
        }
    }
}

/// `whole.fraction × multiplier × 10^exponent` in nanos, rounded up and capped.
fn scaled(whole: &str, fraction: &str, multiplier: i128, exponent: i32) -> Option<i128> {
    let digits: Vec<u8> =
        whole.bytes().chain(fraction.bytes()).map(|b| b - b'0').skip_while(|d| *d == 0).collect();
    if digits.is_empty() {
        return Some(0);
    }
    // The value is digits × 10^shift nanos × multiplier.
    let shift = exponent + 9 - i32::try_from(fraction.len()).ok()?;
    let mut value: i128 = 0;
    let mut rest = false;
    let keep = i32::try_from(digits.len()).ok()? + shift;
    if multiplier == 1 {
        if keep > 30 {
            return Some(MAX_NANOS);
        }
        for (index, digit) in digits.iter().enumerate() {
            if (index as i32) < keep {
                value = value * 10 + i128::from(*digit);
            } else {
                rest |= *digit != 0;
            }
        }
        for _ in digits.len() as i32..keep {
            value *= 10;
        }
    } else {
        // A binary suffix: whole digits and fraction are few enough to multiply first.
        if digits.len() > 18 {
            return if i32::try_from(whole.len()).ok()? > 18 { Some(MAX_NANOS) } else { None };
        }
        let number = digits.iter().fold(0_i128, |n, d| n * 10 + i128::from(*d));
        let scale = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
        let product = match number.checked_mul(multiplier) {
            Some(product) if product < MAX_NANOS => product,
            _ => return Some(MAX_NANOS),
        };
        let (units, part) = (product / scale, product % scale);
        if units > i128::from(i64::MAX) {
            return Some(MAX_NANOS);
        }
        let nanos = part.checked_mul(NANOS)?;
        value = units * NANOS + nanos / scale;
        rest = nanos % scale != 0;
    }
    Some((value + i128::from(rest)).min(MAX_NANOS))
}

impl FromStr for Quantity {
    type Err = ParseQuantityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl TryFrom<&ApiQuantity> for Quantity {
    type Error = ParseQuantityError;

    fn try_from(quantity: &ApiQuantity) -> Result<Self, Self::Error> {
        Self::parse(&quantity.0)
    }
}

impl From<Quantity> for ApiQuantity {
    fn from(quantity: Quantity) -> Self {
        Self(quantity.to_string())
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

impl ops::Add for Quantity {
    type Output = Self;

    /// The sum, written like the first amount (like the second if the first is zero).
    fn add(self, other: Self) -> Self {
        let format = if self.nanos == 0 { other.format } else { self.format };
        Self { nanos: (self.nanos + other.nanos).clamp(-MAX_NANOS, MAX_NANOS), format }
    }
}

impl ops::Sub for Quantity {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self + Self { nanos: -other.nanos, ..other }
    }
}

impl ops::AddAssign for Quantity {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Quantity {
    fn sum<I: Iterator<Item = Self>>(amounts: I) -> Self {
        amounts.fold(Self::ZERO, |sum, amount| sum + amount)
    }
}

impl fmt::Display for Quantity {
    /// The canonical form: the largest suffix that leaves no fraction.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const BINARY: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
        const DECIMAL: [&str; 10] = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"];
        if self.nanos == 0 {
            return f.write_str("0");
        }
        if self.format == Format::Binary && self.nanos % NANOS == 0 {
            let mut value = self.nanos / NANOS;
            // Less than 1024 is printed as a plain number.
            let mut power = 0;
            while value % 1024 == 0 && power < 6 {
                value /= 1024;
                power += 1;
            }
            return write!(f, "{value}{}", BINARY[power]);
        }
        let mut value = self.nanos;
        let mut power = 0;
        while value % 1000 == 0 && power < 9 {
            value /= 1000;
            power += 1;
        }
        match self.format {
            Format::Exponent if power != 3 => write!(f, "{value}e{}", (power as i32 - 3) * 3),
            _ => write!(f, "{value}{}", DECIMAL[power]),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_the_documented_forms() {
        for (text, milli) in [
            ("0", 0),
            ("1", 1000),
            ("100m", 100),
            ("0.1", 100),
            ("1.5", 1500),
            (".5", 500),
            ("5.", 5000),
            ("+2", 2000),
            ("-2", -2000),
            ("1k", 1_000_000),
            ("1Ki", 1_024_000),
            ("1.5Gi", 1_610_612_736_000),
            ("12e6", 12_000_000_000),
            ("1E3", 1_000_000),
            ("1e-3", 1),
            ("100u", 1),
            ("1n", 1),
            ("0.0005", 1),
        ] {
            assert_eq!(Quantity::parse(text).unwrap().milli(), milli, "{text}");
        }
    }

    #[test]
    fn refuses_what_is_not_a_quantity() {
        for text in ["", "m", "1 Gi", "1GiB", "1kb", "1.2.3", "--1", "1e", "0x10", "1K", "é", "-"]
        {
            assert!(Quantity::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn prints_the_canonical_form() {
        for (text, canonical) in [
            ("1000m", "1"),
            ("1500m", "1500m"),
            ("0.5", "500m"),
            ("1024Ki", "1Mi"),
            ("1.5Gi", "1536Mi"),
            ("1000", "1k"),
            ("1e3", "1e3"),
            ("100", "100"),
            ("0Mi", "0"),
            ("1025", "1025"),
            ("-5k", "-5k"),
            ("123456789Ki", "123456789Ki"),
        ] {
            assert_eq!(Quantity::parse(text).unwrap().to_string(), canonical, "{text}");
        }
    }

    #[test]
    fn caps_what_is_too_large() {
        for text in ["9e30", "99999999999999999999", "16Ei"] {
            assert_eq!(Quantity::parse(text).unwrap().value(), i64::MAX, "{text}");
        }
    }

    #[test]
    fn divides_rounding_up() {
        let memory = Quantity::parse("100Mi").unwrap();
        assert_eq!(memory.divided_by(&Quantity::parse("1Mi").unwrap()), 100);
        assert_eq!(memory.divided_by(&Quantity::parse("1Gi").unwrap()), 1);
        assert_eq!(Quantity::parse("250m").unwrap().divided_by(&Quantity::ZERO), 1);
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC*") {
            let _ = Quantity::parse(&text);
        }

        #[test]
        fn what_is_printed_reads_back(milli in -1_000_000_000_000_i64..1_000_000_000_000, bytes in 0..i64::MAX) {
            for quantity in [Quantity::from_milli(milli), Quantity::from_bytes(bytes)] {
                prop_assert_eq!(Quantity::parse(&quantity.to_string()).unwrap(), quantity);
            }
        }
    }
}
