//! Whose pages may call the API from a browser: origins as browsers send them (RFC 6454,
//! section 6.2). What a browser is told of them is `api::cors`'s business.

use http::HeaderValue;
use reqwest::Url;

/// Whose pages may call the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Origins {
    /// Pages of these origins; no page at all when empty.
    Named(Vec<HeaderValue>),
    /// Every page.
    Any,
}

impl Origins {
    /// No page at all.
    pub(crate) const NONE: Self = Self::Named(Vec::new());

    /// Reads a list of origins, or `*` alone; says what is wrong with the first bad one.
    pub(crate) fn read(names: &[String]) -> Result<Self, String> {
        match names {
            [name] if name == "*" => Ok(Self::Any),
            names => {
                names.iter().map(|name| origin(name)).collect::<Result<_, _>>().map(Self::Named)
            }
        }
    }
}

/// One origin, written as browsers write it: anything else would never equal theirs.
fn origin(name: &str) -> Result<HeaderValue, String> {
    if name == "*" {
        return Err("`*` is every origin: it stands alone".into());
    }
    let expected = "expected `https://host` or `http://host:port`";
    let url = Url::parse(name).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    let Some(url) = url.filter(|_| !name.contains('*')) else {
        return Err(format!("`{name}` is no origin, {expected}"));
    };
    let written = url.origin().ascii_serialization();
    if written != name {
        return Err(format!("`{name}` is not how browsers write an origin: write `{written}`"));
    }
    HeaderValue::from_str(name).map_err(|_| format!("`{name}` is no origin, {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(names: &[&str]) -> Result<Origins, String> {
        Origins::read(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn origins_are_read_as_browsers_write_them() {
        assert_eq!(read(&[]), Ok(Origins::NONE));
        assert_eq!(read(&["*"]), Ok(Origins::Any));
        let good = [
            "https://app.example.com",
            "http://localhost:5173",
            "https://xn--bcher-kva.example",
            "http://[::1]:8080",
        ];
        assert_eq!(read(&good), Ok(Origins::Named(good.map(HeaderValue::from_static).to_vec())));
    }

    #[test]
    fn what_no_browser_would_send_is_refused_with_what_it_would() {
        for (name, hint) in [
            ("https://app.example.com/", "`https://app.example.com`"),
            ("https://app.example.com/path?query", "`https://app.example.com`"),
            ("https://App.Example.com", "`https://app.example.com`"),
            ("https://app.example.com:443", "`https://app.example.com`"),
            ("http://user@app.example.com", "`http://app.example.com`"),
            ("https://bücher.example", "`https://xn--bcher-kva.example`"),
            ("app.example.com", "`https://host`"),
            ("https://*.example.com", "`https://host`"),
            ("null", "`https://host`"),
            ("https://", "`https://host`"),
            ("file:///index.html", "`https://host`"),
            ("chrome-extension://abc", "`https://host`"),
        ] {
            let problem = read(&["https://good.example", name]).unwrap_err();
            assert!(problem.contains(&format!("`{name}`")) && problem.contains(hint), "{problem}");
        }
        assert!(read(&["*", "https://app.example.com"]).unwrap_err().contains("alone"));
    }
}
