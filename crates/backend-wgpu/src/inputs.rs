//! Small buffers of numbers (token ids, positions, slots, ..) side by side in one buffer. What the host writes to them before a step waits
//! here until something is submitted, and goes to the adapter as one copy: each copy of wgpu's queue makes a buffer of its own.

use crate::device::Memory;

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
        }
    }

    /// A kernel writes this memory: what is there is not known here any more.
    pub(crate) fn written_by_device(&mut self, memory: &Memory) {
        if let Some(place) = self.part(memory) {
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

    /// What has to be copied: ranges that were written, those together between which everything is known.
    fn copies(&mut self) -> Vec<(usize, usize)> {
        self.written.sort_unstable();
        let mut copies: Vec<(usize, usize)> = Vec::new();
        for (start, end) in self.written.drain(..) {
            let reaches = |last: &(usize, usize)| {
                let unknown = |part: &Part| !part.is_known && part.start < start && part.end > last.1;
                start <= last.1 + Self::REACH && !self.parts.iter().any(unknown)
            };
            match copies.last_mut().filter(|last| reaches(last)) {
                Some(last) => last.1 = last.1.max(end),
                None => copies.push((start, end)),
            }
        }
        copies
    }

    /// Hands what was written to the queue.
    pub(crate) fn flush(&mut self, queue: &wgpu::Queue) {
        if self.written.is_empty() {
            return;
        }
        for (start, end) in self.copies() {
            let buffer = self.buffer.as_ref().expect("made before the first part");
            queue.write_buffer(buffer, start as u64, &self.shadow[start..end]);
        }
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
        assert_eq!(inputs.copies(), [(0, 16), (512, 784)]);
        assert!(inputs.written.is_empty());
        // What the host itself overwrites in full is known again for this copy.
        inputs.written = vec![(0, 16), (256, 272), (512, 528)];
        assert_eq!(inputs.copies(), [(0, 528)]);
        inputs.written = vec![(0, 16), (256, 260), (512, 528)];
        assert_eq!(inputs.copies(), [(0, 260), (512, 528)]);
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
