// Whether this workgroup is the last of `groups` to come here; it sees what the others wrote to memory that is `@coherent`. Counters are
// zero before and after. Everybody of the workgroup takes part.
var<workgroup> is_last: bool;

fn is_last_of(groups: u32, counter: u32, local: u32) -> bool {
  storageBarrier();
  if (local == 0u) {
    is_last = atomicAdd(&arrivals[counter], 1u) + 1u == groups;
    if (is_last) { atomicStore(&arrivals[counter], 0u); }
  }
  let is_last_here = workgroupUniformLoad(&is_last);
  storageBarrier();
  return is_last_here;
}

