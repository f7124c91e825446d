//! The date that templates may print, through `strftime_now(format)`.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

/// What time it is for templates, in seconds since 1970-01-01 00:00 UTC.
///
/// Python's `datetime.now()` is local time; a server's local time is its operator's, so we print UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Clock {
    /// The system's clock.
    #[default]
    System,
    /// A fixed moment: prompts of tests and of reproducible runs.
    Fixed(i64),
}

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "templates show the date")]
    fn seconds(self) -> i64 {
        match self {
            Clock::System => match SystemTime::now().duration_since(UNIX_EPOCH) {
                Ok(since) => since.as_secs() as i64,
                Err(before) => -(before.duration().as_secs() as i64),
            },
            Clock::Fixed(seconds) => seconds,
        }
    }

    /// `datetime.now().strftime(format)` in UTC and English. `Err` names a directive that is not supported.
    pub(super) fn strftime(self, format: &str) -> Result<String, String> {
        let moment = Moment::from_seconds(self.seconds());
        let mut text = String::new();
        let mut characters = format.chars();
        while let Some(character) = characters.next() {
            if character != '%' {
                text.push(character);
                continue;
            }
            let mut directive = characters.next().ok_or("strftime_now: found % at the end of the format")?;
            // `%-d` of the C library: without padding.
            let is_plain = directive == '-';
            if is_plain {
                directive = characters.next().ok_or("strftime_now: found %- at the end of the format")?;
            }
            let start = text.len();
            moment.write(&mut text, directive)?;
            if is_plain {
                let padding = text[start..].len() - text[start..].trim_start_matches('0').len().max(1);
                text.replace_range(start..start + padding, "");
            }
        }
        Ok(text)
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

struct Moment {
    year: i64,
    /// 1..=12
    month: i64,
    /// 1..=31
    day: i64,
    /// 1..=366
    day_of_year: i64,
    /// 0 is Sunday.
    weekday: i64,
    /// Seconds since midnight.
    second_of_day: i64,
}

impl Moment {
    fn from_seconds(seconds: i64) -> Moment {
        let days = seconds.div_euclid(86_400);
        let (year, month, day) = civil_from_days(days);
        let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
        let leap_day = i64::from(is_leap && month > 2);
        Moment {
            year,
            month,
            day,
            day_of_year: before[(month - 1) as usize] + leap_day + day,
            weekday: (days + 4).rem_euclid(7), // 1970-01-01 was a Thursday
            second_of_day: seconds.rem_euclid(86_400),
        }
    }

    fn write(&self, text: &mut String, directive: char) -> Result<(), String> {
        let (hour, minute, second) = (self.second_of_day / 3600, self.second_of_day / 60 % 60, self.second_of_day % 60);
        let month = MONTHS[(self.month - 1) as usize];
        let weekday = WEEKDAYS[self.weekday as usize];
        let result = match directive {
            'Y' => write!(text, "{}", self.year),
            'y' => write!(text, "{:02}", self.year.rem_euclid(100)),
            'm' => write!(text, "{:02}", self.month),
            'd' => write!(text, "{:02}", self.day),
            'e' => write!(text, "{:2}", self.day),
            'H' => write!(text, "{hour:02}"),
            'I' => write!(text, "{:02}", (hour + 11) % 12 + 1),
            'M' => write!(text, "{minute:02}"),
            'S' => write!(text, "{second:02}"),
            'p' => write!(text, "{}", if hour < 12 { "AM" } else { "PM" }),
            'j' => write!(text, "{:03}", self.day_of_year),
            'B' => write!(text, "{month}"),
            'b' | 'h' => write!(text, "{}", &month[..3]),
            'A' => write!(text, "{weekday}"),
            'a' => write!(text, "{}", &weekday[..3]),
            'w' => write!(text, "{}", self.weekday),
            'u' => write!(text, "{}", (self.weekday + 6) % 7 + 1),
            'F' => write!(text, "{}-{:02}-{:02}", self.year, self.month, self.day),
            'T' => write!(text, "{hour:02}:{minute:02}:{second:02}"),
            'R' => write!(text, "{hour:02}:{minute:02}"),
            'D' => write!(text, "{:02}/{:02}/{:02}", self.month, self.day, self.year.rem_euclid(100)),
            'f' => write!(text, "000000"),
            'z' | 'Z' => Ok(()), // datetime.now() has no time zone
            '%' => write!(text, "%"),
            other => return Err(format!("strftime_now: found directive %{other}, which is not supported")),
        };
        result.map_err(|error| error.to_string())
    }
}

/// Year, month and day of a day number since 1970-01-01, in the Gregorian calendar.
/// Algorithm: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468; // from 0000-03-01
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right() {
        let clock = Clock::Fixed(1_740_787_199); // 2025-02-28 23:59:59
        assert_eq!(
            clock.strftime("%Y-%m-%d %H:%M:%S %j %A %-d %b %I %p %%").unwrap(),
            "2025-02-28 23:59:59 059 Friday 28 Feb 11 PM %"
        );
        assert_eq!(Clock::Fixed(951_782_400).strftime("%F %a %j %-m").unwrap(), "2000-02-29 Tue 060 2");
        assert_eq!(Clock::Fixed(-1).strftime("%d %B %Y").unwrap(), "31 December 1969");
        assert!(Clock::Fixed(0).strftime("%Q").unwrap_err().contains("%Q"));
    }
}
