const byId = id => document.getElementById(id);
// Every item: the attributes that filters read, and its element, or the text of one that was not shown yet.
const items = [...document.querySelectorAll('.item')].map(element => ({ element, data: element.dataset }));
const AT_ONCE = items.length, list = byId('more').parentNode;
function plain(text) {  // what escaped text says
  const box = document.createElement('textarea');
  box.innerHTML = text;
  return box.value;
}
for (const waiting of document.querySelectorAll('script[type="text/html"]')) {
  for (const text of waiting.textContent.split(/^(?=<details class="item")/m)) {
    const head = text.slice(0, text.indexOf('>\n')), data = {};
    if (!head.startsWith('<details')) continue;
    for (const [, name, value] of head.matchAll(/ data-(\w+)="([^"]*)"/g)) data[name] = plain(value);
    items.push({ text, data });
  }
}
function made(item) {
  if (!item.element) {
    const holder = document.createElement('template');
    holder.innerHTML = item.text;
    item.element = holder.content.firstElementChild;
    watch(item.element);
  }
  return item.element;
}
function says(item, words) {
  item.spoken ??= (item.element
    ? [...item.element.querySelectorAll('.said')].map(part => part.textContent).join('\n')
    : plain([...item.text.matchAll(/class="(?:prompt )?said(?: text)?">([^<]*)</g)].map(part => part[1]).join('\n'))
  ).toLowerCase();
  return item.spoken.includes(words);
}
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
let pending = [];  // items that fit and are not on the page yet, in their order
function filter() {
  const words = byId('text').value.trim().toLowerCase();
  const fit = items.filter(item => fitting(item.data) && (!words || says(item, words))), fits = new Set(fit);
  for (const [i, item] of items.entries()) {
    if (i < AT_ONCE) item.element.hidden = !fits.has(item);
    else if (item.element) item.element.remove();
  }
  pending = fit.filter(item => item.text);
  if (fit.length - pending.length < AT_ONCE) more();
  tell();
  byId('count').textContent = fit.length + ' of ' + items.length;
}
function more() {
  for (const item of pending.splice(0, AT_ONCE)) list.insertBefore(made(item), byId('more'));
  tell();
}
function tell() { byId('more').textContent = pending.length ? pending.length + ' more; scroll on' : ''; }
new IntersectionObserver(seen => { if (pending.length && seen.some(each => each.isIntersecting)) more(); },
  { rootMargin: '600px' }).observe(byId('more'));
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
function watch(element) { element.addEventListener('toggle', () => { if (element.open) markWords(element); }); }
for (const { element } of items) if (element) watch(element);
function follow() {
  const item = /^#prompt-\d+$/.test(location.hash) && items[location.hash.slice(8) - 1];
  if (!item) return;
  const wanted = made(item);
  if (!wanted.isConnected) {
    pending = pending.filter(each => each !== item);
    list.insertBefore(wanted, items[0].element);  // before all others, rather than to lay out those between
  }
  wanted.hidden = false;
  wanted.open = true;
  markWords(wanted);
  wanted.scrollIntoView();
}
addEventListener('hashchange', follow);
for (const control of document.querySelectorAll('.controls select, .controls input')) control.addEventListener('input', filter);
byId('open').addEventListener('click', () => document.querySelectorAll('.item').forEach(item => { item.open = !item.hidden; }));
byId('close').addEventListener('click', () => document.querySelectorAll('.item').forEach(item => { item.open = false; }));
filter();
follow();
