const rows = [...document.querySelectorAll('tr[data-method]')], drawn = [...document.querySelectorAll('.mark[data-key]')];
const byId = id => document.getElementById(id);
function filter() {
  const words = byId('text').value.trim().toLowerCase(), which = byId('which').value, open = new Set();
  for (const row of rows) {
    const d = row.dataset;
    const visible = ['method', 'scope'].every(name => !byId(name).value || d[name] === byId(name).value)
      && (!which || d[which] === '1') && (!words || d.key.toLowerCase().includes(words));
    row.hidden = !visible;
    if (visible) open.add(d.key);
  }
  for (const mark of drawn) mark.toggleAttribute('hidden', mark.dataset.key !== 'base' && !open.has(mark.dataset.key));
  byId('count').textContent = open.size + ' of ' + rows.length;
}
for (const control of document.querySelectorAll('.controls select, .controls input')) control.addEventListener('input', filter);
filter();
