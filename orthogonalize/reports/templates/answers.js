const items = [...document.querySelectorAll('.item')];
const byId = id => document.getElementById(id);
let spoken;  // what every item says, read when a text is first looked for
const says = (i, words) => {
  spoken ??= items.map(item => [...item.querySelectorAll('.said')].map(part => part.textContent).join('\n').toLowerCase());
  return spoken[i].includes(words);
};
const changed = flags => flags === '10' || flags === '01', same = flags => flags === '00' || flags === '11';
const fits = {
  '': () => true,
  changed: d => changed(d.shown), same: d => same(d.shown),
  'refusal-changed': d => changed(d.refused), 'refusal-same': d => same(d.refused),
  different: d => d.different === '1', equal: d => d.different === '0',
};
const has = (flags, side, wanted) => !wanted || flags['base edited'.split(' ').indexOf(side)] === wanted;
function fitting(d) {
  return fits[byId('which').value](d) && (!byId('set').value || d.set === byId('set').value)
    && (!byId('kind')?.value || d.kind === byId('kind').value)
    && ['base', 'edited'].every(side => {
      const [of, wanted] = byId(side).value.split(':');
      return has(of === 'shown' ? d.shown : d.refused, side, wanted);
    });
}
function filter() {
  const words = byId('text').value.trim().toLowerCase();
  let shown = 0;
  for (const [i, item] of items.entries()) {
    const visible = fitting(item.dataset) && (!words || says(i, words));
    item.hidden = !visible;
    shown += visible;
  }
  byId('count').textContent = shown + ' of ' + items.length;
}
const LONGEST = 1500;  // words of both answers together that are compared
function shared(a, b) {  // for each word of a and b, whether it is in their longest common subsequence
  const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--)
    table[i][j] = a[i] === b[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
  const inA = new Set(), inB = new Set();
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) { inA.add(i++); inB.add(j++); }
    else if (table[i + 1][j] >= table[i][j + 1]) i++;
    else j++;
  }
  return [inA, inB];
}
function markWords(item) {
  const texts = [...item.querySelectorAll('.text')];
  if (item.dataset.marked || texts.length !== 2) return;
  item.dataset.marked = '1';
  const parts = texts.map(text => text.textContent.split(/(\s+)/));
  const words = parts.map(each => each.filter((_, i) => i % 2 === 0));
  if (words[0].length + words[1].length > LONGEST) return;
  shared(...words).forEach((same, side) => {
    texts[side].replaceChildren(...parts[side].map((part, i) => {
      if (i % 2 || !part || same.has(i / 2)) return document.createTextNode(part);
      const mark = document.createElement('mark');
      mark.textContent = part;
      return mark;
    }));
  });
}
for (const item of items) item.addEventListener('toggle', () => { if (item.open) markWords(item); });
function follow() {
  const wanted = /^#prompt-\d+$/.test(location.hash) && byId(location.hash.slice(1));
  if (!wanted) return;
  wanted.hidden = false;
  wanted.open = true;
  markWords(wanted);
  wanted.scrollIntoView();
}
addEventListener('hashchange', follow);
for (const control of document.querySelectorAll('.controls select, .controls input')) control.addEventListener('input', filter);
byId('open').addEventListener('click', () => items.forEach(item => { if (!item.hidden) item.open = true; }));
byId('close').addEventListener('click', () => items.forEach(item => { item.open = false; }));
filter();
follow();
