//! Numbers: from token text to [`serde_json::Number`] and the text of doubles.
//!
//! Owns: the rule which numbers are integers (what fits i64 or u64) and how doubles are written
//! (17 significant digits, shortest of fixed and scientific form, as C's `%.17g`).

use std::borrow::Cow;

use serde_json::Number;

/// Significant digits of a written double; enough to read the same double back.
const DIGITS: usize = 17;

/// Value of an integer token; integers beyond i64 and u64 become doubles.
pub(super) fn integer(text: &str) -> Number {
    if let Ok(value) = text.parse::<i64>() {
        return value.into();
    }
    if let Ok(value) = text.parse::<u64>() {
        return value.into();
    }
    let value: f64 = text.parse().unwrap_or(0.0);
    text_of(value).parse().unwrap_or_else(|_| 0.into())
}

/// Value of a number token with a fraction or exponent. Its text is kept, so that it never passes
/// for an integer.
pub(super) fn float(text: &str) -> Number {
    text.parse().unwrap_or_else(|_| 0.into())
}

/// How a number is written: integers as they are, others as doubles. Beyond the range of doubles
/// the largest one is taken, so that what is echoed is JSON.
pub(super) fn written(number: &Number) -> Cow<'_, str> {
    let text = number.as_str();
    if !text.contains(['.', 'e', 'E']) {
        return Cow::Borrowed(text);
    }
    let value: f64 = text.parse().unwrap_or(0.0);
    Cow::Owned(text_of(value.clamp(f64::MIN, f64::MAX)))
}

/// `%.17g` of a finite double.
fn text_of(value: f64) -> String {
    let scientific = format!("{:.*e}", DIGITS - 1, value);
    let Some((mantissa, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if exponent < -4 || exponent >= DIGITS as i32 {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{}e{sign}{:02}", without_trailing_zeros(mantissa), exponent.abs());
    }
    let decimals = (DIGITS as i32 - 1 - exponent).max(0) as usize;
    without_trailing_zeros(&format!("{value:.decimals$}")).to_owned()
}

fn without_trailing_zeros(digits: &str) -> &str {
    if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_are_written_with_seventeen_digits_as_the_peer_does() {
        for (text, want) in [
            ("1.5", "1.5"),
            ("0.1", "0.10000000000000001"),
            ("1e3", "1000"),
            ("1e16", "10000000000000000"),
            ("1e17", "1e+17"),
            ("0.00001", "1.0000000000000001e-05"),
            ("123456789.123456789", "123456789.12345679"),
            ("123456.7e-3", "123.4567"),
            ("1e-400", "0"),
            ("-0.0", "-0"),
        ] {
            assert_eq!(written(&float(text)), want, "{text}");
        }
    }

    #[test]
    fn a_whole_number_with_an_exponent_is_no_integer() {
        assert_eq!(float("1e3").as_i64(), None);
        assert_eq!(integer("1000").as_i64(), Some(1000));
    }

    #[test]
    fn integers_beyond_64_bits_become_doubles() {
        assert_eq!(integer("18446744073709551615").to_string(), "18446744073709551615");
        assert_eq!(written(&integer("18446744073709551616")), "1.8446744073709552e+19");
        assert_eq!(written(&integer("-9223372036854775809")), "-9.2233720368547758e+18");
        assert_eq!(integer("-0").to_string(), "0");
    }
}
