//! Options of one image in the form that `--image-opts` takes: `driver=qcow2,file.filename=PATH`.
//!
//! Owns: what such a text leaves out and the peer adds (a file is opened by the driver `file`, a
//! lone file name is that of the file). Everything else is as for `blockdev-add`: the same table
//! checks it. Does not: open anything, nor guess a format.

use serde::Deserialize;
use serde_json::{Map, Value};

use liveblk_engine::graph::OpenNode;

use super::nodes::standalone;
use crate::cli::parse_keyval;
use crate::json::parse_one;
use crate::schema::shared::BLOCKDEV_OPTIONS;
use crate::schema::{BlockdevOptions, Source, validate};

/// The options of one image.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageOpts {
    members: Map<String, Value>,
    source: Source,
}

impl ImageOpts {
    /// Reads `text`, as `key=value,...` or as JSON.
    ///
    /// # Errors
    /// What is wrong with its form, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (value, source) = if text.starts_with('{') {
            let value = parse_one(text).map_err(|error| error.to_string())?;
            (value.unwrap_or_default(), Source::Json)
        } else {
            let parsed = parse_keyval(text, None).map_err(|error| error.to_string())?;
            (parsed.value, Source::Keyval)
        };
        let Value::Object(mut members) = value else {
            return Err("Options of an image are an object".to_owned());
        };
        let is_file = members.get("driver").and_then(Value::as_str) == Some("file");
        if !is_file
            && !members.contains_key("file")
            && let Some(name) = members.shift_remove("filename")
        {
            members.insert("file".to_owned(), serde_json::json!({ "filename": name }));
        }
        for child in ["file", "data-file"] {
            if let Some(Value::Object(file)) = members.get_mut(child) {
                file.entry("driver").or_insert_with(|| "file".into());
            }
        }
        Ok(Self { members, source })
    }

    /// The format, if it is said.
    pub fn driver(&self) -> Option<&str> {
        self.members.get("driver")?.as_str()
    }

    /// The name of the file that holds the image, if one is opened for it.
    pub fn filename(&self) -> Option<&str> {
        let own = self.members.get("filename");
        own.or_else(|| self.members.get("file")?.get("filename"))?.as_str()
    }

    /// The node to open, of format `driver`; `read_only` and `force_share` where the options do
    /// not say it themselves.
    ///
    /// # Errors
    /// Which option is unknown or has a value that cannot be, in the peer's words.
    pub fn open(
        mut self,
        driver: &str,
        read_only: bool,
        force_share: bool,
    ) -> Result<OpenNode, String> {
        let switch = |on: bool| match self.source {
            Source::Json => Value::Bool(on),
            Source::Keyval => Value::from(if on { "on" } else { "off" }),
        };
        let (read_only, force_share) = (switch(read_only), switch(force_share));
        self.members.insert("driver".to_owned(), driver.into());
        self.members.entry("read-only").or_insert(read_only);
        self.members.entry("force-share").or_insert(force_share);
        let value = Value::Object(self.members);
        let value = validate(&BLOCKDEV_OPTIONS, value, self.source);
        let value = value.map_err(|error| error.to_string())?;
        let options = BlockdevOptions::deserialize(value).map_err(|error| error.to_string())?;
        standalone(options).map_err(|failure| failure.desc)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use liveblk_engine::format::InfoValue;
    use liveblk_engine::graph::FileSource;

    #[test]
    fn short_forms_mean_a_file_and_options_reach_the_format() {
        for text in [
            "driver=qcow2,file.driver=file,file.filename=a,l2-cache-size=1048576",
            "driver=qcow2,file.filename=a,l2-cache-size=1048576",
            "driver=qcow2,filename=a,l2-cache-size=1048576",
            r#"{"driver":"qcow2","file":{"filename":"a"},"l2-cache-size":1048576}"#,
        ] {
            let opts = ImageOpts::parse(text).expect(text);
            assert_eq!((opts.driver(), opts.filename()), (Some("qcow2"), Some("a")), "{text}");
            let open = opts.open("qcow2", true, true).expect(text);
            assert!(!open.writable && open.force_share, "{text}");
            assert_eq!(
                open.format_options.get("l2-cache-size"),
                Some(&InfoValue::Number(1 << 20)),
                "{text}"
            );
            let FileSource::Open(file) = open.file else { panic!("{text}") };
            assert_eq!(file.path.to_str(), Some("a"));
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let refused = |text: &str| {
            let opts = ImageOpts::parse(text)?;
            opts.open("raw", false, false).map(|_| ())
        };
        for (text, part) in [
            ("a.qcow2", "a.qcow2"),
            ("file.filename=a,foo=1", "foo"),
            ("file.filename=a,offset=x", "offset"),
            ("file.filename=a,file.locking=maybe", "maybe"),
            ("offset=512", "file"),
            ("[]", "[]"),
        ] {
            let error = refused(text).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
