//! Compares expressions and statements with the results of jinja2, which
//! `tests/clients/chat_templates.py` has written into the fixture.

use super::translate;
use crate::text::{ChatTemplate, RenderOptions, TextError};
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

fn render(source: &str, variables: &Value) -> Result<String, TextError> {
    let options = RenderOptions {
        extra: variables.as_object().cloned().unwrap_or_default(),
        now: Some(UNIX_EPOCH + Duration::from_secs(86_400)),
        ..RenderOptions::default()
    };
    ChatTemplate::new(source, None, None)?.render(&[], &options)
}

#[test]
fn templates_mean_what_they_mean_in_jinja2() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/text/jinja2.json");
    let fixture: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() > 95, "{}", cases.len());
    let mut wrong = 0;
    for case in cases {
        let source = case[0].as_str().unwrap();
        let rendered = render(source, &fixture["variables"]);
        if rendered.as_deref().ok() != case[1].as_str() {
            wrong += 1;
            println!("{source}\n  want {}\n  got  {rendered:?}", case[1]);
        }
    }
    assert_eq!(wrong, 0, "of {}", cases.len());
}

#[test]
fn what_needs_no_translation_stays_as_it_is() {
    for source in [
        "",
        "a { b } %} }} #}",
        "{{ a.b[1] | c(d, e=2) }}{% if not a %}\n{% endif %}{# ~ % + #}",
        "{% for a, b in c.items() if a is not none and b not in (c) recursive %}{% endfor %}",
        "{% set a.b = [1, 2] %}{% macro f(a, b=1) %}{% endmacro %}{% raw %}{{ a + b }}{% endraw %}",
        "{{ f(*a, **b) }}{{ -a ** 2 }}{{ a[1:2, :] }}{{ 'it\\'s' }}{{ \"}}\" }}",
        // Tags that do not end are left for minijinja to reject.
        "{{ a + b",
        "{% if 'a + b %}",
        "{{ (a + b }}",
        "{{ a) + b }}",
        "{% raw %}{{ a + b }}",
    ] {
        assert_eq!(translate(source).unwrap(), source);
    }
    assert_eq!(
        translate("{{- a + b ~ c % d -}}\n{%+ set x = (1,\n2) -%}").unwrap(),
        "{{- __add( a , __concatenate( b , __remainder( c , d )))-}}\n{%+ set x =  __tuple([1,\n2]) -%}"
    );
}

#[test]
fn hostile_sources_neither_panic_nor_take_long() {
    let deep = |open: &str, close: &str| {
        format!("{{{{ {}1{} }}}}", open.repeat(50_000), close.repeat(50_000))
    };
    for source in [
        deep("(", ")"),
        deep("[", "]"),
        deep("(1+", ")"),
        format!("{{{{ {}1 }}}}", "1 ~ ".repeat(50_000)),
        format!("{{{{ {}1 }}}}", "1 - ".repeat(50_000)),
        format!("{{{{ {}1 }}}}", "1 - ".repeat(499)),
        format!("{{{{ {}1 }}}}", "-".repeat(50_000)),
        format!("{{{{ {}1 }}}}", "-".repeat(999)),
        format!("{{{{ {}1 }}}}", "not ".repeat(50_000)),
        format!("{{{{ a{} }}}}", ".b".repeat(50_000)),
        format!("{{{{ a{} }}}}", "|upper".repeat(50_000)),
        format!("{{% if a %}}{}{{% endif %}}", "{% elif b %}".repeat(50_000)),
        format!("{{% if a %}}{}{{% endif %}}", "{% elif b %}".repeat(500)),
        "{{".repeat(50_000),
        "{%".repeat(50_000),
        "{{ 'é' é ~ 🙂 }}{% é %}".to_owned(),
        "{%raw%}".repeat(1000),
        format!("{{{{ {}", "-".repeat(50_000)),
    ] {
        let _ = translate(&source);
        let _ = ChatTemplate::new(&source, None, None);
    }
    let long = format!("a\n{{{{ {}1 }}}}", "1 - ".repeat(50_000));
    assert!(matches!(
        ChatTemplate::new(&long, None, None),
        Err(TextError::TemplateSyntax { line: 2, .. })
    ));
}

#[test]
fn values_that_grow_without_bound_are_rejected() {
    let none = Value::Null;
    for source in [
        "{% set ns = namespace(s='a') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s='a') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(64) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
        "{% set s = 'a' * 100000 %}{{ s.replace('a', s) }}",
        "{% set s = 'a' * 100000 %}{{ s.join(s | list) }}",
    ] {
        let error = render(source, &none).unwrap_err().to_string();
        assert!(error.contains("more than"), "{source}: {error}");
    }
}

#[test]
fn errors_name_what_is_wrong_and_its_line() {
    let failed = |source: &str| render(source, &Value::Null).unwrap_err();
    let error = failed("a\n\n{{ 'a' + {} }}");
    assert!(
        matches!(&error, TextError::TemplateFailed { line: 3, message }
            if message.contains("can only concatenate str (not \"dict\") to str")),
        "{error}"
    );
    let error = failed("{{ 5 | length }}");
    assert!(
        error
            .to_string()
            .contains("object of type 'int' has no len()"),
        "{error}"
    );
    let error = failed("{{ missing | tojson }}");
    assert!(
        error.to_string().contains("not JSON serializable"),
        "{error}"
    );
}
