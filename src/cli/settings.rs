//! Settings of `quell serve`, in order of precedence: flags, the environment, the settings
//! file, the defaults.
//!
//! Every flag has a variable and a key of the same name: `--drain-timeout`,
//! `QUELL_DRAIN_TIMEOUT`, `drain-timeout`. Both are added to clap's definition of the
//! command, so that all settings are checked in one way and `--help` explains them all.

use super::error::CliError;
use clap::{Arg, ArgAction, Command};
use std::ffi::OsString;
use std::path::PathBuf;
use toml::{Table, Value};

/// Returns the settings file that the command line or the environment names. The first of the
/// arguments is the name of the command.
///
/// The command itself parses the arguments, so that only what it takes for `--config` counts.
/// Mistakes are not reported here: the arguments are parsed again together with the file.
pub fn file(command: Command, arguments: &[OsString]) -> Option<PathBuf> {
    let command = command.ignore_errors(true);
    let matches = command.try_get_matches_from(arguments).ok()?;
    let named = matches.get_one::<PathBuf>("config").cloned();
    named.or_else(|| std::env::var_os("QUELL_CONFIG").map(PathBuf::from))
}

/// Reads the settings file.
pub fn read(path: PathBuf) -> Result<Table, CliError> {
    let text = std::fs::read_to_string(&path).map_err(|source| CliError::Read {
        path: path.clone(),
        source,
    })?;
    text.parse().map_err(|error: toml::de::Error| {
        let problem = error.message();
        CliError::Usage(format!("{} is not valid TOML: {problem}", path.display()))
    })
}

/// Returns the command with the environment and the file as sources for its flags.
pub fn layered(command: Command, file: &Table) -> Result<Command, CliError> {
    for key in file.keys() {
        let known = |argument: &Arg| argument.get_long() == Some(key) && key != "config";
        if !command.get_arguments().any(known) {
            let problem = format!("the settings file has {key:?}, but there is no flag --{key}");
            return Err(CliError::Usage(problem));
        }
    }
    let mut failed = None;
    let command = command.mut_args(|argument| {
        let Some(name) = argument.get_long().map(str::to_owned) else {
            return argument;
        };
        if matches!(
            argument.get_action(),
            ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version
        ) {
            return argument;
        }
        let variable = format!("QUELL_{}", name.replace('-', "_").to_uppercase());
        let argument = argument.env(variable);
        match file.get(&name).map(|value| texts(&name, value)) {
            None => argument,
            Some(Ok(values)) => argument.required(false).default_values(values),
            Some(Err(error)) => {
                failed = Some(error);
                argument
            }
        }
    });
    failed.map_or(Ok(command), Err)
}

/// Converts a value to the form that it would have on the command line.
fn texts(name: &str, value: &Value) -> Result<Vec<String>, CliError> {
    let one = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Float(number) => Ok(number.to_string()),
        Value::Boolean(flag) => Ok(flag.to_string()),
        other => Err(CliError::Usage(format!(
            "{name} in the settings file is a {}, expected a string, a number, true or false, or \
             a list of them",
            other.type_str()
        ))),
    };
    match value {
        Value::Array(values) => values.iter().map(one).collect(),
        value => Ok(vec![one(value)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command() -> Command {
        Command::new("serve")
            .arg(
                Arg::new("config")
                    .long("config")
                    .value_parser(clap::value_parser!(PathBuf)),
            )
            .arg(Arg::new("model").long("model").required(true))
            .arg(Arg::new("port").long("port").default_value("8000"))
            .arg(Arg::new("quiet").long("quiet").action(ArgAction::SetTrue))
            .arg(Arg::new("names").long("names").action(ArgAction::Append))
            .arg(Arg::new("raw").long("raw").allow_hyphen_values(true))
    }

    fn parse(file: &str, arguments: &[&str]) -> Result<clap::ArgMatches, CliError> {
        let command = layered(command(), &file.parse().unwrap())?;
        let arguments = ["serve"].iter().chain(arguments);
        command
            .try_get_matches_from(arguments)
            .map_err(|error| CliError::Usage(error.to_string()))
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let file = "model = 'm'\nport = 9000\nquiet = true\nnames = ['a', 'b']";
        let from_file = parse(file, &[]).unwrap();
        let text = |matches: &clap::ArgMatches, name| matches.get_one::<String>(name).cloned();
        assert_eq!(text(&from_file, "port").as_deref(), Some("9000"));
        assert_eq!(text(&from_file, "model").as_deref(), Some("m"));
        assert!(from_file.get_flag("quiet"));
        let names: Vec<&String> = from_file.get_many("names").unwrap().collect();
        assert_eq!(names, ["a", "b"]);
        let from_flag = parse(file, &["--port", "1"]).unwrap();
        assert_eq!(text(&from_flag, "port").as_deref(), Some("1"));
        let by_default = parse("", &["--model", "x"]).unwrap();
        assert_eq!(text(&by_default, "port").as_deref(), Some("8000"));
        assert!(!by_default.get_flag("quiet"));
    }

    #[test]
    fn the_settings_file_is_what_the_command_takes_for_config() {
        let file = |arguments: &[&str]| {
            let arguments = ["serve"].iter().chain(arguments).map(OsString::from);
            file(command(), &arguments.collect::<Vec<_>>())
        };
        let named = Some(PathBuf::from("a.toml"));
        assert_eq!(file(&["--model", "m", "--config", "a.toml"]), named);
        assert_eq!(file(&["--config=a.toml"]), named);
        assert_eq!(
            file(&["--quiet", "--config", "a.toml", "--quiet", "x"]),
            named
        );
        for other in [
            &[][..],
            &["--model", "m"],
            &["--config"],
            &["--names=--config", "a.toml"],
            &["--names=--config=a.toml"],
            &["--raw", "--config", "a.toml"],
            &["--raw", "--config=a.toml"],
            &["--", "--config", "a.toml"],
        ] {
            assert_eq!(file(other), None, "{other:?}");
        }
    }

    #[test]
    fn a_key_without_a_flag_and_a_value_without_sense_are_named() {
        for (file, expected) in [
            ("prot = 1", "\"prot\""),
            ("config = 'x'", "\"config\""),
            ("port = {a = 1}", "port in the settings file is a table"),
            ("help = true", "\"help\""),
        ] {
            let error = parse(file, &["--model", "x"]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
