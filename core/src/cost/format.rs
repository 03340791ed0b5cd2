//! Quantities with their units, for people.

use crate::{Error, Result};

/// Bytes with a decimal unit, three digits and more: `824 B`, `3.12 GB`.
pub fn format_bytes(bytes: f64) -> String {
    scaled(bytes, "B")
}

/// Seconds with a unit, three digits and more: `824 us`, `9.83 ms`.
pub fn format_seconds(seconds: f64) -> String {
    let (factor, unit) = match seconds {
        s if s == 0.0 || s >= 0.9995 => (1.0, "s"),
        s if s >= 0.999_5e-3 => (1e3, "ms"),
        s if s >= 0.999_5e-6 => (1e6, "us"),
        _ => (1e9, "ns"),
    };
    format!("{} {unit}", digits(seconds * factor))
}

/// A quantity with a decimal prefix for its unit: `65 TFLOP`.
fn scaled(value: f64, unit: &str) -> String {
    let prefixes = ["", "k", "M", "G", "T", "P", "E"];
    let steps = (1..prefixes.len()).take_while(|step| value >= 0.9995 * 1000_f64.powi(*step as i32)).count();
    format!("{} {}{unit}", digits(value / 1000_f64.powi(steps as i32)), prefixes[steps])
}

/// Three digits, or all those before the point.
fn digits(value: f64) -> String {
    let decimals = match value {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        _ => 2,
    };
    format!("{value:.decimals$}")
}

/// Bytes of a text: a number and a unit, as in `16GB` (10^9), `16 GiB` (2^30) or `16e9`.
///
/// # Errors
///
/// [`Error::Mismatch`] for anything else.
pub fn bytes_from_text(text: &str) -> Result<f64> {
    let wrong = || Error::mismatch("bytes", "a positive number with a unit, as 16GB or 16GiB", format!("`{text}`"));
    let text = text.trim();
    // An exponent is a part of the number: the unit begins with the last letters.
    let unit = text.len() - text.chars().rev().take_while(char::is_ascii_alphabetic).count();
    let (number, unit) = text.split_at(unit);
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024_f64.powi(2),
        "gib" => 1024_f64.powi(3),
        "tib" => 1024_f64.powi(4),
        _ => return Err(wrong()),
    };
    match number.trim().parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number * factor),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_have_three_digits_and_a_unit() {
        for (bytes, text) in [
            (0.0, "0.00 B"),
            (824.0, "824 B"),
            (999.4, "999 B"),
            (999.6, "1.00 kB"),
            (3.115e9, "3.12 GB"),
            (20.13e9, "20.1 GB"),
            (1e21, "1000 EB"),
        ] {
            assert_eq!(format_bytes(bytes), text);
        }
        for (seconds, text) in [
            (0.0, "0.00 s"),
            (823.5e-6, "824 us"),
            (9.83e-3, "9.83 ms"),
            (0.9996, "1.00 s"),
            (5e-9, "5.00 ns"),
            (75.0, "75.0 s"),
        ] {
            assert_eq!(format_seconds(seconds), text);
        }
    }

    #[test]
    fn bytes_are_read_with_decimal_and_binary_units() {
        for (text, bytes) in [
            ("16GB", 16e9),
            ("16 GiB", 16.0 * 1_073_741_824.0),
            ("1.5mb", 1.5e6),
            ("16e9", 16e9),
            ("7", 7.0),
            ("2e3 kB", 2e6),
        ] {
            assert_eq!(bytes_from_text(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "GB", "-1GB", "nan", "inf", "16 GP", "1e400", "sixteen", "0"] {
            assert!(bytes_from_text(text).is_err(), "{text}");
        }
    }
}
