    // Item group.y of a work list (work_list.wgsl), if there is one.
    if (group.y >= list[0]) { return; }
    matrix = list[4u + 4u * group.y];
    first = list[5u + 4u * group.y];
    count = list[6u + 4u * group.y];
