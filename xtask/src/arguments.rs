//! What the user wrote after `cargo xtask <chore>`. Knows no chore's meaning.

use anyhow::{Context as _, Result, bail};

/// The words not yet understood.
pub(crate) struct Arguments(Vec<String>);

impl Arguments {
    pub(crate) fn new(words: Vec<String>) -> Self {
        Self(words)
    }

    /// Was `--name` given?
    pub(crate) fn flag(&mut self, name: &str) -> bool {
        let before = self.0.len();
        self.0.retain(|word| word != name);
        self.0.len() != before
    }

    /// The word after `--name`, or what follows `--name=`.
    pub(crate) fn value(&mut self, name: &str) -> Result<Option<String>> {
        let prefix = format!("{name}=");
        if let Some(at) = self.0.iter().position(|word| word.starts_with(&prefix)) {
            return Ok(Some(self.0.remove(at)[prefix.len()..].to_owned()));
        }
        let Some(at) = self.0.iter().position(|word| word == name) else { return Ok(None) };
        if at + 1 >= self.0.len() {
            bail!("{name} needs a value");
        }
        self.0.remove(at);
        Ok(Some(self.0.remove(at)))
    }

    /// A number given as `--name N`.
    pub(crate) fn number(&mut self, name: &str) -> Result<Option<u64>> {
        self.value(name)?
            .map(|text| text.parse().with_context(|| format!("{name} {text}: not a number")))
            .transpose()
    }

    /// A list given as `--name a,b,c`.
    pub(crate) fn list(&mut self, name: &str) -> Result<Option<Vec<String>>> {
        Ok(self.value(name)?.map(|text| text.split(',').map(str::to_owned).collect()))
    }

    /// The remaining words; options among them are mistakes.
    pub(crate) fn rest(self) -> Result<Vec<String>> {
        if let Some(word) = self.0.iter().find(|word| word.starts_with('-')) {
            bail!("unknown option {word}");
        }
        Ok(self.0)
    }

    /// Nothing may be left.
    pub(crate) fn end(self) -> Result<()> {
        if let Some(word) = self.0.first() {
            bail!("unexpected {word}");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(words: &[&str]) -> Arguments {
        Arguments::new(words.iter().map(|word| (*word).to_owned()).collect())
    }

    #[test]
    fn both_spellings_of_a_value_are_understood_and_the_rest_is_refused() {
        let mut given = arguments(&["--runs", "3", "--images=small,node", "--slow", "--what"]);
        assert_eq!(given.number("--runs").unwrap(), Some(3));
        assert_eq!(given.list("--images").unwrap().unwrap(), ["small", "node"]);
        assert!(given.flag("--slow"));
        assert!(given.end().is_err());
    }

    #[test]
    fn a_missing_or_malformed_value_is_an_error() {
        assert!(arguments(&["--runs"]).number("--runs").is_err());
        assert!(arguments(&["--runs", "many"]).number("--runs").is_err());
    }
}
