//! Any bytes as a safetensors file. A header that is accepted must keep its promises.

#![no_main]

use libfuzzer_sys::fuzz_target;
use moellon_checkpoint::header;
use std::path::Path;

fuzz_target!(|data: &[u8]| {
    let file = Path::new("fuzz.safetensors");
    check(header::parse(file, data), data.len());
    // Again as the JSON of a file whose length field is right: most inputs would fail at the length.
    let with_length = [&(data.len() as u64).to_le_bytes(), data].concat();
    check(header::parse(file, &with_length), with_length.len());
});

fn check(parsed: moellon_checkpoint::Result<header::Header>, file_bytes: usize) {
    match parsed {
        Ok(header) => {
            let mut covered = header.data_start;
            for tensor in &header.tensors {
                assert_eq!(tensor.range.start, covered);
                assert_eq!(tensor.range.len(), tensor.shape.iter().product::<usize>() * tensor.dtype.size_bytes());
                covered = tensor.range.end;
            }
            assert_eq!(covered, file_bytes);
        }
        Err(error) => assert!(!error.to_string().contains('\n'), "a message is one line"),
    }
}
