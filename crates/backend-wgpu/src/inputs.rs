//! Small buffers of numbers (token ids, positions, slots, ..) side by side in one buffer. What the host writes to them before a step waits
//! here until something is submitted, and goes to the adapter as one copy: each copy of wgpu's queue makes a buffer of its own.
//!
//! That buffer, and the commands around it, cost about 30 us between one token and the next. A step that is replayed has its copy in its own
//! commands instead, encoded ahead, out of one of two buffers that the host writes through a mapping. They serve a step that writes what
//! the step before it wrote; any other goes the first way.

use crate::device::Memory;
use moellon_ops::Result;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Of all starts of bindings, on any adapter.
const ALIGNMENT: usize = 256;

/// A range that somebody has.
#[derive(Debug)]
struct Part {
    /// Of its memory.
    id: u64,
    start: usize,
    end: usize,
    /// Only the host ever wrote it: `shadow` says what is there.
    is_known: bool,
}

/// The buffer and what the host knows of it.
#[derive(Debug, Default)]
pub(crate) struct Inputs {
    pub(crate) buffer: Option<wgpu::Buffer>,
    /// What the host wrote last, byte by byte.
    shadow: Vec<u8>,
    /// In order of their starts.
    parts: Vec<Part>,
    /// Starts and ends of what was written since the last submission.
    written: Vec<(usize, usize)>,
    /// The same of the submission before.
    before: Vec<(usize, usize)>,
    /// How often parts came and went, or became unknown.
    generation: u64,
    uploads: Vec<Upload>,
    /// Of `uploads`: the one that is used next.
    next_upload: usize,
}

/// A buffer that the host writes and the adapter copies from.
#[derive(Debug)]
struct Upload {
    buffer: wgpu::Buffer,
    is_mapped: Arc<AtomicBool>,
}

/// A copy that stands in encoded commands.
#[derive(Debug)]
pub(crate) struct Copies {
    upload: usize,
    /// What the host must have written for it to be right, in order.
    written: Vec<(usize, usize)>,
    ranges: Vec<(usize, usize)>,
    generation: u64,
}

/// What the host knows of some memories.
pub(crate) struct Known {
    pub(crate) ranges: Vec<(usize, usize)>,
    pub(crate) generation: u64,
}

impl Inputs {
    /// Bytes of the buffer.
    pub(crate) const BYTES: u64 = 256 << 10;
    /// Most bytes of one part.
    const LARGEST: u64 = 16 << 10;
    /// Most bytes that are copied again to make two copies one.
    const REACH: usize = 4 << 10;

    /// Whether `bytes` more must go elsewhere.
    pub(crate) fn is_full_for(&self, bytes: u64) -> bool {
        bytes > Self::LARGEST || self.gap(Self::taken(bytes)).is_none()
    }

    /// Bytes of a part for so many bytes.
    fn taken(bytes: u64) -> usize {
        bytes.max(16).next_multiple_of(16) as usize
    }

    /// The first free range of so many bytes: its start and its place among the parts.
    fn gap(&self, bytes: usize) -> Option<(usize, usize)> {
        let mut start = 0;
        for (i, part) in self.parts.iter().enumerate() {
            if start + bytes <= part.start {
                return Some((start, i));
            }
            start = part.end.next_multiple_of(ALIGNMENT);
        }
        (start + bytes <= Self::BYTES as usize).then_some((start, self.parts.len()))
    }

    /// Takes a range, zeroed, for the memory `id`: the buffer, where the range starts, and its bytes.
    pub(crate) fn take(&mut self, id: u64, bytes: u64) -> (wgpu::Buffer, u64, u64) {
        let bytes = Self::taken(bytes);
        let (start, place) = self.gap(bytes).expect("is_full_for said that there is room");
        let end = start + bytes;
        self.parts.insert(place, Part { id, start, end, is_known: true });
        self.generation += 1;
        self.shadow.resize(Self::BYTES as usize, 0);
        self.shadow[start..end].fill(0);
        self.written.push((start, end));
        (self.buffer.clone().expect("made before the first part"), start as u64, bytes as u64)
    }

    fn part(&self, memory: &Memory) -> Option<usize> {
        self.parts.iter().position(|part| part.id == memory.id)
    }

    /// Frees the range of a memory, if it has one here.
    pub(crate) fn give_back(&mut self, memory: &Memory) {
        if let Some(place) = self.part(memory) {
            self.parts.remove(place);
            self.generation += 1;
        }
    }

    /// A kernel writes this memory: what is there is not known here any more.
    pub(crate) fn written_by_device(&mut self, memory: &Memory) {
        if let Some(place) = self.part(memory) {
            self.generation += u64::from(self.parts[place].is_known);
            self.parts[place].is_known = false;
        }
    }

    /// Keeps a write until the next submission; `false` if the memory is not here.
    pub(crate) fn write(&mut self, to: &Memory, at: u64, bytes: &[u8]) -> bool {
        if self.part(to).is_none() {
            return false;
        }
        let start = (to.offset + at) as usize;
        self.shadow[start..start + bytes.len()].copy_from_slice(bytes);
        self.written.push((start, start + bytes.len()));
        true
    }

    /// What was written, in order; nothing is any more.
    fn take_written(&mut self) -> Vec<(usize, usize)> {
        let mut written = std::mem::take(&mut self.written);
        written.sort_unstable();
        written.dedup();
        self.before.clone_from(&written);
        written
    }

    /// What has to be copied: ranges that were written, those together between which everything is known.
    fn ranges(&self, written: &[(usize, usize)]) -> Vec<(usize, usize)> {
        let mut ranges: Vec<(usize, usize)> = Vec::new();
        for &(start, end) in written {
            let reaches = |last: &(usize, usize)| {
                let unknown = |part: &Part| !part.is_known && part.start < start && part.end > last.1;
                start <= last.1 + Self::REACH && !self.parts.iter().any(unknown)
            };
            match ranges.last_mut().filter(|last| reaches(last)) {
                Some(last) => last.1 = last.1.max(end),
                None => ranges.push((start, end)),
            }
        }
        ranges
    }

    /// Whether something waits.
    pub(crate) fn has_written(&self) -> bool {
        !self.written.is_empty()
    }

    /// Hands what was written to the queue.
    pub(crate) fn flush(&mut self, queue: &wgpu::Queue) {
        if self.written.is_empty() {
            return;
        }
        let written = self.take_written();
        for (start, end) in self.ranges(&written) {
            let buffer = self.buffer.as_ref().expect("made before the first part");
            queue.write_buffer(buffer, start as u64, &self.shadow[start..end]);
        }
    }

    /// Buffers that the host writes through mappings, mapped.
    pub(crate) fn upload_through(&mut self, buffers: [wgpu::Buffer; 2]) {
        let upload = |buffer| Upload { buffer, is_mapped: Arc::new(AtomicBool::new(true)) };
        self.uploads = buffers.map(upload).into();
    }

    /// Encodes the copy of what the step before wrote, for the next one; nothing where it would have no use.
    pub(crate) fn encode_ahead(&mut self, encoder: &mut wgpu::CommandEncoder) -> Option<Copies> {
        /// Of starts of mapped ranges.
        const ALIGNMENT: usize = 8;
        let to = self.buffer.as_ref().filter(|_| !self.uploads.is_empty() && !self.before.is_empty())?;
        let ranges = self.ranges(&self.before);
        if !ranges.iter().all(|(start, _)| start.is_multiple_of(ALIGNMENT)) {
            return None;
        }
        for &(start, end) in &ranges {
            let from = &self.uploads[self.next_upload].buffer;
            encoder.copy_buffer_to_buffer(from, start as u64, to, start as u64, (end - start) as u64);
        }
        let copies =
            Copies { upload: self.next_upload, written: self.before.clone(), ranges, generation: self.generation };
        self.next_upload = (self.next_upload + 1) % self.uploads.len();
        Some(copies)
    }

    /// Writes what an encoded copy will read; `false` if the copy is not what has to be copied now.
    pub(crate) fn fill(&mut self, copies: &Copies) -> bool {
        self.written.sort_unstable();
        self.written.dedup();
        let upload = &self.uploads[copies.upload];
        let fits = self.written == copies.written && self.generation == copies.generation;
        if !fits || !upload.is_mapped.load(Ordering::Acquire) {
            return false;
        }
        for &(start, end) in &copies.ranges {
            let Ok(mut view) = upload.buffer.get_mapped_range_mut(start as u64..end as u64) else { return false };
            view.copy_from_slice(&self.shadow[start..end]);
        }
        upload.is_mapped.store(false, Ordering::Release);
        upload.buffer.unmap();
        self.take_written();
        true
    }

    /// Ranges of the memories `ids` of which the host alone knows what is there, near ones together, and when they stop being right.
    pub(crate) fn known(&self, ids: &HashSet<u64>) -> Known {
        let wanted = self.parts.iter().filter(|part| part.is_known && ids.contains(&part.id));
        let wanted: Vec<_> = wanted.map(|part| (part.start, part.end)).collect();
        Known { ranges: self.ranges(&wanted), generation: self.generation }
    }

    /// Whether `known` is still right and covers all that was written. Then nothing waits any more, and `write` is told what is there.
    pub(crate) fn fill_known(
        &mut self,
        known: &Known,
        mut write: impl FnMut(usize, &[u8]) -> Result<()>,
    ) -> Result<bool> {
        let covered = |(start, end): &(usize, usize)| known.ranges.iter().any(|(from, to)| from <= start && end <= to);
        if known.generation != self.generation || !self.written.iter().all(covered) {
            return Ok(false);
        }
        for &(start, end) in &known.ranges {
            write(start, &self.shadow[start..end])?;
        }
        self.take_written();
        Ok(true)
    }

    /// When [`Known`] was right for the last time.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Asks for the mapping of what an encoded copy reads, which was submitted.
    pub(crate) fn map_again(&self, copies: &Copies) {
        let upload = &self.uploads[copies.upload];
        let is_mapped = Arc::clone(&upload.is_mapped);
        upload
            .buffer
            .map_async(wgpu::MapMode::Write, .., move |mapped| is_mapped.store(mapped.is_ok(), Ordering::Release));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(id: u64, start: usize, end: usize, is_known: bool) -> Part {
        Part { id, start, end, is_known }
    }

    #[test]
    fn ranges_meet_unless_the_device_wrote_between_them() {
        let parts =
            vec![part(1, 0, 16, true), part(2, 256, 272, false), part(3, 512, 528, true), part(4, 768, 784, true)];
        let mut inputs = Inputs { parts, ..Inputs::default() };
        inputs.written = vec![(768, 784), (0, 16), (512, 516)];
        let written = inputs.take_written();
        assert_eq!(inputs.ranges(&written), [(0, 16), (512, 784)]);
        assert!(inputs.written.is_empty());
        // What the host itself overwrites in full is known again for this copy.
        assert_eq!(inputs.ranges(&[(0, 16), (256, 272), (512, 528)]), [(0, 528)]);
        assert_eq!(inputs.ranges(&[(0, 16), (256, 260), (512, 528)]), [(0, 260), (512, 528)]);
    }

    #[test]
    fn freed_ranges_are_taken_again() {
        let mut inputs = Inputs { parts: vec![part(1, 0, 16, true), part(3, 512, 528, true)], ..Inputs::default() };
        assert_eq!(inputs.gap(256), Some((256, 1)));
        assert_eq!(inputs.gap(272), Some((768, 2)));
        inputs.parts.remove(0);
        assert_eq!(inputs.gap(512), Some((0, 0)));
        assert!(!inputs.is_full_for(16 << 10));
        assert!(inputs.is_full_for((16 << 10) + 16));
        inputs.parts.push(part(4, 768, Inputs::BYTES as usize, true));
        assert!(inputs.is_full_for(4096));
        // A part of nothing takes 16 bytes too.
        assert!(!inputs.is_full_for(0));
        inputs.parts.insert(0, part(5, 0, 512, true));
        assert!(inputs.is_full_for(0));
    }
}
