//! `strftime` for chat templates that tell the model the date. All times are in UTC.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

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

/// Point in time, split into the fields that format codes name.
struct Moment {
    year: i64,
    /// Month, 0 to 11.
    month: usize,
    /// Day of the month, 1 to 31.
    day: i64,
    /// Day of the week; 0 is Sunday.
    weekday: usize,
    /// Day of the year, 0 to 365.
    day_of_year: i64,
    hour: i64,
    minute: i64,
    second: i64,
}

impl Moment {
    /// Splits `time` into its calendar fields.
    ///
    /// Uses Hinnant's algorithm ("chrono-Compatible Low-Level Date Algorithms"), in which
    /// years begin in March so that the leap day comes last.
    fn new(time: SystemTime) -> Self {
        let seconds = match time.duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_secs()).unwrap_or(0),
            Err(before) => -i64::try_from(before.duration().as_secs()).unwrap_or(0),
        };
        let (days, second_of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_march_year =
            day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_march_year + 2) / 153;
        let day = day_of_march_year - (153 * march_month + 2) / 5 + 1;
        let month = (march_month + 2) % 12;
        let year = year_of_era + era * 400 + i64::from(month < 2);
        let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
        let day_of_year = if month < 2 {
            day_of_march_year - 306
        } else {
            day_of_march_year + 59 + i64::from(leap)
        };
        Self {
            year,
            month: usize::try_from(month).unwrap_or(0),
            day,
            weekday: usize::try_from((days + 4).rem_euclid(7)).unwrap_or(0),
            day_of_year,
            hour: second_of_day / 3600,
            minute: second_of_day / 60 % 60,
            second: second_of_day % 60,
        }
    }

    /// Returns the text of one format code, or `None` if `letter` is not a code.
    fn field(&self, letter: char) -> Option<String> {
        let weekday = i64::try_from(self.weekday).unwrap_or(0);
        let half_day = (self.hour + 11) % 12 + 1;
        Some(match letter {
            'Y' => self.year.to_string(),
            'y' => format!("{:02}", self.year.rem_euclid(100)),
            'm' => format!("{:02}", self.month + 1),
            'B' => MONTHS[self.month].to_owned(),
            'b' | 'h' => MONTHS[self.month][..3].to_owned(),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'j' => format!("{:03}", self.day_of_year + 1),
            'A' => DAYS[self.weekday].to_owned(),
            'a' => DAYS[self.weekday][..3].to_owned(),
            'w' => self.weekday.to_string(),
            'u' => if self.weekday == 0 { 7 } else { self.weekday }.to_string(),
            'H' => format!("{:02}", self.hour),
            'I' => format!("{half_day:02}"),
            'M' => format!("{:02}", self.minute),
            'S' => format!("{:02}", self.second),
            'f' => "000000".to_owned(),
            'p' => if self.hour < 12 { "AM" } else { "PM" }.to_owned(),
            'F' => self.fields("%Y-%m-%d"),
            'T' | 'X' => self.fields("%H:%M:%S"),
            'R' => self.fields("%H:%M"),
            'D' | 'x' => self.fields("%m/%d/%y"),
            'c' => self.fields("%a %b %e %H:%M:%S %Y"),
            'U' => format!("{:02}", (self.day_of_year + 7 - weekday) / 7),
            'W' => format!("{:02}", (self.day_of_year + 7 - (weekday + 6) % 7) / 7),
            'C' => format!("{:02}", self.year.div_euclid(100)),
            'Z' => "UTC".to_owned(),
            'z' => "+0000".to_owned(),
            'n' => "\n".to_owned(),
            't' => "\t".to_owned(),
            '%' => "%".to_owned(),
            _ => return None,
        })
    }

    fn fields(&self, format: &str) -> String {
        let mut text = String::new();
        let mut letters = format.chars();
        while let Some(letter) = letters.next() {
            if letter != '%' {
                text.push(letter);
                continue;
            }
            let rest = letters.as_str();
            let unpadded = rest.starts_with('-');
            let Some(name) = rest.chars().nth(usize::from(unpadded)) else {
                text.push('%');
                continue;
            };
            let Some(field) = self.field(name) else {
                text.push('%');
                continue;
            };
            letters = rest[usize::from(unpadded) + name.len_utf8()..].chars();
            let field = match field.trim_start_matches(['0', ' ']) {
                _ if !unpadded => &field,
                "" => "0",
                short => short,
            };
            let _ = text.write_str(field);
        }
        text
    }
}

/// Formats `time` according to `format`. Unknown format codes are copied unchanged.
pub(super) fn strftime(time: SystemTime, format: &str) -> String {
    Moment::new(time).fields(format)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(seconds: u64, format: &str) -> String {
        strftime(UNIX_EPOCH + Duration::from_secs(seconds), format)
    }

    #[test]
    fn dates_follow_the_calendar() {
        assert_eq!(
            at(0, "%A %d %B %Y, day %j"),
            "Thursday 01 January 1970, day 001"
        );
        assert_eq!(at(951_782_400, "%a %d %b %Y %j"), "Tue 29 Feb 2000 060");
        assert_eq!(at(951_868_800, "%F %j"), "2000-03-01 061");
        assert_eq!(
            at(1_735_689_599, "%d %b %Y %H:%M:%S %j"),
            "31 Dec 2024 23:59:59 366"
        );
        assert_eq!(at(4_107_542_400, "%F %A"), "2100-03-01 Monday");
        assert_eq!(at(951_782_400, "%U %W %C"), "09 09 20");
        assert_eq!(at(0, "%U %W"), "00 00");
        assert_eq!(at(3 * 86_400, "%a %U %W"), "Sun 01 00");
        assert_eq!(at(4 * 86_400, "%a %U %W"), "Mon 01 01");
        let before = strftime(UNIX_EPOCH - Duration::from_secs(1), "%F %T");
        assert_eq!(before, "1969-12-31 23:59:59");
    }

    #[test]
    fn padding_and_unknown_letters_are_as_in_c() {
        assert_eq!(at(1_735_693_260, "%-d/%-m %I:%M %p %-I"), "1/1 01:01 AM 1");
        assert_eq!(at(0, "100%% %Q %é %-Q %"), "100% %Q %é %-Q %");
    }
}
