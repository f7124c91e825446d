// The distinct experts of a batch as a list of work: items of at most `item_rows` choices of one expert.
// list: [number of items, -, -, -], items {expert, first, count, -} from word 4 on, choices sorted by expert from `sorted_offset` on.
// A choice is token * top_k + i. One workgroup; the order of everything is that of experts and choices.
struct Args { ids_offset: u32, ids_stride: u32, num_tokens: u32, top_k: u32, num_experts: u32, item_rows: u32, sorted_offset: u32 }
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> ids: array<u32>;
@group(0) @binding(1) var<storage, read_write> list: array<u32>;

const MAX_EXPERTS: u32 = 1024u;
const TILE: u32 = 1024u;
var<workgroup> counts: array<u32, MAX_EXPERTS>;
var<workgroup> items: array<u32, MAX_EXPERTS>;      // of each expert
var<workgroup> nexts: array<u32, MAX_EXPERTS>;      // where its next choice goes
var<workgroup> chosen: array<u32, TILE>;            // experts of some choices in a row

fn load_tile(start: u32, num_choices: u32, local: u32) {
  workgroupBarrier();
  for (var i = local; i < min(TILE, num_choices - start); i += 256u) {
    let choice = start + i;
    chosen[i] = ids[args.ids_offset + (choice / args.top_k) * args.ids_stride + choice % args.top_k];
  }
  workgroupBarrier();
}

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) local: u32) {
  let num_choices = args.num_tokens * args.top_k;
  for (var expert = local; expert < args.num_experts; expert += 256u) { counts[expert] = 0u; }
  for (var start = 0u; start < num_choices; start += TILE) {
    load_tile(start, num_choices, local);
    for (var expert = local; expert < args.num_experts; expert += 256u) {
      var count = counts[expert];
      for (var i = 0u; i < min(TILE, num_choices - start); i++) { count += u32(chosen[i] == expert); }
      counts[expert] = count;
    }
  }
  for (var expert = local; expert < args.num_experts; expert += 256u) {
    items[expert] = (counts[expert] + args.item_rows - 1u) / args.item_rows;
  }
  workgroupBarrier();
  for (var expert = local; expert < args.num_experts; expert += 256u) {
    var first = 0u;
    var item = 0u;
    for (var other = 0u; other < expert; other++) {
      first += counts[other];
      item += items[other];
    }
    nexts[expert] = first;
    let end = first + counts[expert];
    for (var start = first; start < end; start += args.item_rows) {
      list[4u + 4u * item] = expert;
      list[5u + 4u * item] = start;
      list[6u + 4u * item] = min(args.item_rows, end - start);
      item++;
    }
    if (expert + 1u == args.num_experts) { list[0] = item; }
  }
  for (var start = 0u; start < num_choices; start += TILE) {
    load_tile(start, num_choices, local);
    for (var expert = local; expert < args.num_experts; expert += 256u) {
      var at = nexts[expert];
      for (var i = 0u; i < min(TILE, num_choices - start); i++) {
        if (chosen[i] == expert) {
          list[args.sorted_offset + at] = start + i;
          at++;
        }
      }
      nexts[expert] = at;
    }
  }
}
