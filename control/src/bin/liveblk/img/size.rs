//! Sizes on command lines and for people, in qemu-img's forms.
//!
//! Read: a decimal number with an optional fraction and an optional suffix (b or B: bytes; k, M, G,
//! T, P, E: powers of 1024), or a hexadecimal number without one; what is beyond 64 bits is read as
//! the largest number, for the caller to refuse. Shown: three digits and a binary
//! unit.

/// The largest size that is taken, in bytes.
pub(crate) const SIZE_MAX: u64 = i64::MAX as u64;

/// The bytes that `text` means; `None` if it means none.
pub(crate) fn parse(text: &str) -> Option<u64> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        let hex = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        return hex.then(|| u64::from_str_radix(digits, 16).unwrap_or(u64::MAX));
    }
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = shift_of(text.get(number.len()..)?)?;
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) => (whole, Some(fraction)),
        None => (number, None),
    };
    let digits = |part: &str| part.bytes().all(|digit| digit.is_ascii_digit());
    if !digits(whole) || !fraction.is_none_or(digits) {
        return None;
    }
    let fraction = match fraction {
        None | Some("") => 0,
        // A part of a byte is no size.
        Some(_) if shift == 0 => return None,
        Some(part) => part_of_unit(part, shift)?,
    };
    if whole.is_empty() && number.len() < 2 {
        return None;
    }
    // More than there can be is the most there can be: a range is what the caller checks.
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().unwrap_or(u64::MAX) };
    Some(whole.saturating_mul(1 << shift).saturating_add(fraction))
}

fn shift_of(suffix: &str) -> Option<u32> {
    Some(match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return None,
    })
}

/// The bytes of a decimal fraction (its digits) of a unit, rounded to the next byte.
fn part_of_unit(digits: &str, shift: u32) -> Option<u64> {
    // More digits than these do not change a byte.
    let digits = digits.get(..digits.len().min(18))?;
    let value: u128 = digits.parse().ok()?;
    let scale = 10_u128.checked_pow(u32::try_from(digits.len()).ok()?)?;
    u64::try_from(((value << shift) + scale / 2) / scale).ok()
}

/// `bytes` for people: three digits and a unit.
pub(crate) fn shown(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    // The next unit begins at 1000, so that there are never four digits.
    let unit = UNITS
        .iter()
        .enumerate()
        .find(|(index, _)| (bytes as f64) < 1000.0 * ((1_u64 << (index * 10)) as f64))
        .map_or(UNITS.len() - 1, |(index, _)| index);
    let value = bytes as f64 / (1_u64 << (unit * 10)) as f64;
    let name = UNITS.get(unit).copied().unwrap_or_default();
    format!("{} {name}B", three_digits(value))
}

/// `value` (below 1000 and not negative) with three significant digits, without needless zeroes.
fn three_digits(value: f64) -> String {
    let decimals = match value {
        value if value >= 999.5 => return "1e+03".to_owned(),
        value if value >= 99.95 => 0,
        value if value >= 9.995 => 1,
        value if value >= 0.9995 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_the_peer_reads_them() {
        let good = [
            ("1.5k", 1536),
            ("0x100", 256),
            ("1b", 1),
            ("10B", 10),
            ("1K", 1024),
            ("0.5k", 512),
            (".5k", 512),
            ("1.k", 1024),
            ("0", 0),
            ("1.9999k", 2048),
            ("1M", 1 << 20),
            ("7E", 7 << 60),
            ("1.5T", 3 << 39),
            ("18446744073709551616", u64::MAX),
            ("16E", u64::MAX),
        ];
        for (text, bytes) in good {
            assert_eq!(parse(text), Some(bytes), "{text}");
        }
        let bad = [
            "", "1.5", "1.5b", "1kk", "0x1k", "0x", "k", ".", ".k", "-1", "+1", "1 ", "1x",
            "1.2.3", "\u{e9}", "1\u{e9}", "1e5",
        ];
        for text in bad {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_as_the_peer_shows_them() {
        let all = [
            (0, "0 B"),
            (512, "512 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (200_704, "196 KiB"),
            (1_462_272, "1.39 MiB"),
            (1 << 20, "1 MiB"),
            (1_572_864, "1.5 MiB"),
            (1_000_448, "977 KiB"),
            (1 << 62, "4 EiB"),
        ];
        for (bytes, text) in all {
            assert_eq!(shown(bytes), text);
        }
    }
}
