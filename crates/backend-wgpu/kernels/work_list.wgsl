// The distinct experts of a batch as a list of work: items of at most `item_rows` choices of one expert.
// list: [number of items, -, -, -], items {expert, first, count, -} from word 4 on, choices sorted by expert from `sorted_offset` on.
// A choice is token * top_k + i. One workgroup; the order of everything is that of experts and choices.
struct Args { ids_offset: u32, ids_stride: u32, num_tokens: u32, top_k: u32, num_experts: u32, item_rows: u32, sorted_offset: u32 }
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> ids: array<u32>;
@group(0) @binding(1) var<storage, read_write> list: array<u32>;

const MAX_EXPERTS: u32 = 1024u;
var<workgroup> counts: array<u32, MAX_EXPERTS>;
var<workgroup> item_starts: array<u32, MAX_EXPERTS>;

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) local: u32) {
  let num_choices = args.num_tokens * args.top_k;
  for (var expert = local; expert < args.num_experts; expert += 256u) {
    var count = 0u;
    for (var choice = 0u; choice < num_choices; choice++) {
      count += u32(ids[args.ids_offset + (choice / args.top_k) * args.ids_stride + choice % args.top_k] == expert);
    }
    counts[expert] = count;
  }
  workgroupBarrier();
  if (local == 0u) {
    var sum = 0u;
    var items = 0u;
    for (var expert = 0u; expert < args.num_experts; expert++) {
      let count = counts[expert];
      counts[expert] = sum;
      item_starts[expert] = items;
      sum += count;
      items += (count + args.item_rows - 1u) / args.item_rows;
    }
    list[0] = items;
  }
  workgroupBarrier();
  for (var expert = local; expert < args.num_experts; expert += 256u) {
    let first = counts[expert];
    var at = first;
    for (var choice = 0u; choice < num_choices; choice++) {
      if (ids[args.ids_offset + (choice / args.top_k) * args.ids_stride + choice % args.top_k] == expert) {
        list[args.sorted_offset + at] = choice;
        at++;
      }
    }
    var item = item_starts[expert];
    for (var start = first; start < at; start += args.item_rows) {
      list[4u + 4u * item] = expert;
      list[5u + 4u * item] = start;
      list[6u + 4u * item] = min(args.item_rows, at - start);
      item++;
    }
  }
}
